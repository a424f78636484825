"""Methods of the field by name, each a set of options of `autoprune run`.

`autoprune run --method NAME` changes defaults; what is given beside it counts. No torch
here, since `autoprune methods` has to answer at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from autoprune.errors import check_known


@dataclass(frozen=True)
class Method:
    """A published way to prune.

    Attributes:
        kind: What it brings: "criterion", "sparse training", "masks", "allocator",
            "search" or "pipeline".
        granularity: What it removes.
        paper: Authors, year and venue or preprint.
        options: Option of `autoprune run` to the value that makes the method.
    """

    kind: str
    granularity: str
    paper: str
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, object]:
        """Option of `autoprune run` to the value that it has by default.

        What isn't a search leaves weights as they are unless it says otherwise: that is
        how it was published.
        """
        # Of searches only the searcher is published elsewhere; how candidates are
        # scored is this project's own.
        if self.kind == "search":
            return dict(self.options)
        return {"proxy.reconstruct": "off", **self.options}

    def to_json(self, name: str) -> dict:
        """Plain data."""
        row = {
            "name": name,
            "kind": self.kind,
            "granularity": self.granularity,
            "paper": self.paper,
        }
        return row | {"options": self.defaults}


def _ranked(criterion: str, paper: str, agent: str = "uniform") -> Method:
    return Method(
        "criterion", "channel", paper, {"criterion": criterion, "agent": agent}
    )


def _sparse(method: str, criterion: str, paper: str) -> Method:
    options = {"sparse.method": method, "criterion": criterion, "agent": "global"}
    return Method("sparse training", "channel", paper, options)


def _search(paper: str, **options: object) -> Method:
    return Method("search", "channel", paper, options)


def _masks(granularity: str, paper: str, **options: object) -> Method:
    defaults = {"granularity": granularity, "agent": "global", "criterion": "l1"}
    return Method("masks", granularity, paper, defaults | options)


def _gradual(granularity: str, paper: str, agent: str, **how: object) -> Method:
    options = {
        "granularity": granularity,
        "agent": agent,
        "removal.method": "gradual",
        # The training that prunes is all the training there is, as published.
        "epochs": 0,
    }
    return Method("pipeline", granularity, paper, options | how)


def _merging(method: str, paper: str) -> Method:
    return Method(
        "sparse training",
        "channel",
        paper,
        # Merged channels lose nothing, so no fine-tuning is part of the method.
        {"removal.method": method, "agent": "uniform", "epochs": 0},
    )


METHODS: dict[str, Method] = {
    # Criteria. Papers that compare channels across layers get the agent global, the
    # others the same share in each layer.
    "l1": _ranked("l1", "Li et al. 2017, ICLR"),
    "l2": _ranked("l2", "Li et al. 2017, ICLR"),
    "fpgm": _ranked("fpgm", "He et al. 2019, CVPR"),
    "activation": _ranked("activation", "Molchanov et al. 2017, ICLR"),
    "apoz": _ranked("apoz", "Hu et al. 2016, arXiv 1607.03250"),
    "bn_scale": _ranked("bn_scale", "Liu et al. 2017, ICCV", "global"),
    "taylor": _ranked("taylor", "Molchanov et al. 2019, CVPR", "global"),
    "hessian": _ranked("hessian", "LeCun et al. 1990, NIPS", "global"),
    "lamp": _ranked("lamp", "Lee et al. 2021, ICLR", "global"),
    "random": _ranked("random", "the control"),
    "cost_aware": _ranked(
        "l1", "Molchanov et al. 2017, ICLR, section 2.2", "cost_aware"
    ),
    # Trainings after which little is lost with what goes.
    "l1_training": _sparse("l1", "l1", "Han et al. 2015, NIPS"),
    "l2_training": _sparse("l2", "l2", "Han et al. 2015, NIPS"),
    "group_lasso": _sparse("group_lasso", "l2", "Wen et al. 2016, NIPS"),
    "slimming": _sparse("slimming", "bn_scale", "Liu et al. 2017, ICCV"),
    "depgraph": _sparse("group_decay", "l2", "Fang et al. 2023, CVPR"),
    "centripetal": _merging("centripetal", "Ding et al. 2019, CVPR"),
    "resrep": _merging("resrep", "Ding et al. 2021, ICCV"),
    "drop_out": Method(
        "sparse training",
        "channel",
        "Srivastava et al. 2014, JMLR; targeted: Gomez et al. 2019",
        {"sparse.method": "drop_out", "criterion": "l2", "agent": "uniform"},
    ),
    # Units finer or coarser than channels.
    "weight_magnitude": _masks("weight", "Han et al. 2015, NIPS"),
    "layer": Method(
        "allocator",
        "layer",
        "Chen and Zhao 2019, TPAMI",
        {"granularity": "layer", "agent": "global"},
    ),
    "row": _masks("row", "Mao et al. 2017, CVPRW"),
    "column": _masks("column", "Mao et al. 2017, CVPRW"),
    "kernel": _masks("kernel", "Mao et al. 2017, CVPRW"),
    # The paper ranks filters within each layer.
    "filter": _masks("filter", "Li et al. 2017, ICLR", agent="uniform"),
    "random_weights": _masks(
        "weight",
        "Wan et al. 2013, ICML: one mask of Drop Connect, kept",
        criterion="random",
    ),
    "lamp_weights": _masks("weight", "Lee et al. 2021, ICLR", criterion="lamp"),
    # More than half, since some layers can't have the pattern and count in full.
    "2:4": _masks("2:4", "Mishra et al. 2021, arXiv 2104.08378", budget="macs=60%"),
    "gsm": _masks("weight", "Ding et al. 2019, NeurIPS", **{"sparse.method": "gsm"}),
    "drop_connect": _masks(
        "weight",
        "Wan et al. 2013, ICML; targeted: Gomez et al. 2019",
        **{"sparse.method": "drop_connect"},
    ),
    "sensitivity": Method(
        "allocator",
        "channel",
        "Li et al. 2017, ICLR; dynamic programming",
        {"agent": "sensitivity"},
    ),
    "iterative": _gradual(
        "channel",
        "Li et al. 2017, ICLR",
        "uniform",
        **{"removal.schedule": "linear", "removal.prunings": 5},
    ),
    "agp": _gradual(
        "weight",
        "Zhu and Gupta 2017, arXiv 1710.01878",
        "global",
        **{"removal.prunings": 30},
    ),
    "three_dimensions": Method(
        "allocator",
        "depth, width and image size",
        "Wang et al. 2021, ICML",
        {"granularity": "dimensions", "agent": "polynomial"},
    ),
    # Batch norm calibrated on other images is what the paper is about.
    "eagleeye": Method(
        "pipeline",
        "channel",
        "Li et al. 2020, ECCV",
        {"agent": "eagleeye", "proxy.statistics": "calibration"},
    ),
    "amc": _search(
        "He et al. 2018, ECCV",
        agent="ddpg",
        reward="amc",
        # Its candidates have weights solved by least squares.
        **{"proxy.reconstruct": "on"},
    ),
    # Learners and searchers on this project's own environment.
    "dyna": _search("this project; Sutton 1991 for the idea", agent="dyna"),
    "ppo": _search("Schulman et al. 2017, arXiv 1707.06347", agent="ppo"),
    "sac": _search("Haarnoja et al. 2018, ICML", agent="sac"),
    "td3": _search("Fujimoto et al. 2018, ICML", agent="td3"),
    "ddpg": _search("Lillicrap et al. 2016, ICLR", agent="ddpg"),
    "tqc": _search("Kuznetsov et al. 2020, ICML", agent="tqc"),
    "evolution": _search("Hansen 2016, arXiv 1604.00772", agent="evolution"),
    "tpe": _search("Bergstra et al. 2011, NIPS", agent="tpe"),
}


def method_named(name: str) -> Method:
    """The method called `name`.

    Raises:
        UserError: If there is none; the nearest is offered.
    """
    check_known("method", name, METHODS)
    return METHODS[name]


def methods_table() -> list[dict]:
    """All methods as plain data, in the order of `METHODS`."""
    return [method.to_json(name) for name, method in METHODS.items()]
