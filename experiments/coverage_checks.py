"""What has to hold for every network, as a table of checks.

Each is a small function from a case to columns of the table. A check raises where
something is wrong; `measure` catches that, so that one failure doesn't hide the others.
"""

import copy
import json
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoprune.costs.cost import CostTable
from autoprune.deploy.export import MAX_ONNX_BYTES, export_onnx
from autoprune.deploy.pruned import saved_tensors
from autoprune.structure.changes import find_changes, set_attributes
from autoprune.structure.groups import Groups
from autoprune.structure.slicing import fit_shapes, prune
from autoprune.tracing.masking import mask
from autoprune.tracing.trace import describe, trace
from experiments.coverage_networks import FirstTensor, Network, example, randomise
from experiments.coverage_tools import (
    Usage,
    counted_macs,
    describe_error,
    difference,
    n_params,
    operations,
    outputs,
    require,
    time_limit,
    without_gradient,
    zero_removed,
)

SEEDS = (0, 1)
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
SMALLEST_CHANGE = 1e-3
# Dense, masked and pruned copies of larger networks don't fit the memory of a small
# machine in float64.
MAX_DOUBLE_PARAMS = 320_000_000
LIMIT_S = 1800
# Operations that read channels without weights of their own, as those of a spectral
# norm do: zeros in the weights before them don't hide a channel.
NOT_ZEROED = {
    "native_batch_norm_of_its_input",
    "native_layer_norm",
    "native_group_norm",
    "_softmax",
    "linalg_vector_norm",
    "vdot",
    "bmm",
    "baddbmm",
    "var",
    "std",
    "var_mean",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
    "_fused_rms_norm",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_attention_math",
}


@dataclass
class Case:
    """One network with random values, ready to be checked.

    Attributes:
        network: Its builder.
        model: The network.
        size: Height and width of its input.
        dtype: Of values and inputs.
        traced: Its trace; None before the first check.
        kept: Seed to group to kept channels.
    """

    network: Network
    model: nn.Module
    size: int
    dtype: torch.dtype
    traced: Groups | None = None
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def groups(self) -> Groups:
        """The network's trace."""
        assert self.traced is not None, "the first check sets it"
        return self.traced

    def images(self, batch: int) -> Tensor:
        """As many inputs, the same at every call."""
        return example((batch, 3, self.size, self.size), self.dtype, seed=1)

    def pruned(self, seed: int) -> nn.Module:
        """A new network with the channels that are kept for a seed."""
        return prune(self.model, self.groups, self.kept[seed])


def make_case(network: Network) -> Case:
    """The network in float64 if memory and its code allow, else in float32."""
    torch.manual_seed(0)
    model = network.build()
    size = network.size(model)
    randomise(model, size)
    if n_params(model) > MAX_DOUBLE_PARAMS:
        return Case(network, model, size, torch.float32)
    try:
        outputs(model.double(), example((1, 3, size, size), torch.float64))
        return Case(network, model, size, torch.float64)
    except RuntimeError:  # the forward pass makes float32 tensors of its own
        return Case(network, model.float(), size, torch.float32)


def measure(case: Case, limit_s: int = LIMIT_S) -> Iterator[dict]:
    """Runs all checks one by one.

    Args:
        case: The network.
        limit_s: CPU seconds that a check may take.

    Yields:
        The columns that each check fills; `failures` where it fails.
    """
    dtype = str(case.dtype).removeprefix("torch.")
    yield {"size": case.size, "params": n_params(case.model), "dtype": dtype}
    for name, check in CHECKS.items():
        try:
            with time_limit(limit_s), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield check(case)
        # Whatever the network, the tracer or the exporter raises.
        except Exception as error:
            yield {"failures": f"{name}: {describe_error(error)}"}
            if case.traced is None:
                break
    yield {"seconds": round(time.process_time(), 1)}


def measure_onnx(case: Case, limit_s: int = LIMIT_S) -> Iterator[dict]:
    """Exports the pruned network; apart, since that takes as long as all the rest.

    Args:
        case: The network.
        limit_s: CPU seconds that it may take.

    Yields:
        The columns; `onnx_failure` where it fails.
    """
    try:
        with time_limit(limit_s), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_proof(case)
            yield check_onnx(case)
    # Whatever the network, the tracer or the exporter raises.
    except Exception as error:
        yield {"onnx_failure": describe_error(error)}
    yield {"onnx_seconds": round(time.process_time(), 1)}


def check_trace(case: Case) -> dict:
    """Groups found from labels alone."""
    with Usage() as usage:
        case.traced = trace(case.model, case.images(1), verify=False)
    draw_allocations(case)
    return {
        "trace_seconds": usage.seconds,
        "trace_mib": usage.mib,
        **summary(case.groups),
    }


def check_proof(case: Case) -> dict:
    """Groups after their numerical proof.

    Those are what users get, and what the other checks are about.
    """
    with Usage() as usage:
        case.traced = trace(case.model, case.images(1))
    draw_allocations(case)
    return {
        "proof_seconds": usage.seconds,
        "proof_mib": usage.mib,
        **summary(case.groups),
    }


def check_equivalence(case: Case) -> dict:
    """Pruned equals masked, and masking changes the output."""
    x = case.images(2)
    errors = []
    changes = []
    dense = outputs(case.model, x)
    for seed in SEEDS:
        masked = outputs(mask(case.model, case.groups, case.kept[seed]), x)
        errors.append(difference(outputs(case.pruned(seed), x), masked))
        changes.append(difference(dense, masked))
    require(
        min(changes) > SMALLEST_CHANGE,
        f"masking changes the output by {min(changes):.1e} only",
    )
    require(
        max(errors) < TOLERANCE[case.dtype],
        f"pruned and masked differ by {max(errors):.1e}",
    )
    return {"error": f"{max(errors):.1e}", "change": f"{min(changes):.1e}"}


def check_zeroed(case: Case) -> dict:
    """Pruned equals a dense copy with zeros in the weights that read removed channels.

    That copy owes nothing to labels. Only where every reader has such weights; keeping
    all channels has to be the identity everywhere.
    """
    x = case.images(2)
    everything = {group.name: torch.arange(group.channels) for group in case.groups}
    whole = prune(case.model, case.groups, everything)
    same = difference(outputs(whole, x), outputs(case.model, x))
    require(
        same < TOLERANCE[case.dtype],
        f"keeping every channel changes the output by {same:.1e}",
    )
    if operations(case.model, x) & NOT_ZEROED:
        return {"zeroed_error": "not comparable"}
    errors = []
    for seed in SEEDS:
        pruned = outputs(case.pruned(seed), x)
        twin = zero_removed(case.model, case.groups, case.kept[seed])
        errors.append(difference(pruned, outputs(twin, x)))
    require(
        max(errors) < TOLERANCE[case.dtype],
        f"pruned and zeroed weights differ by {max(errors):.1e}",
    )
    return {"zeroed_error": f"{max(errors):.1e}"}


def check_costs(case: Case) -> dict:
    """Predicted MACs and parameters are those of the network, dense and pruned."""
    costs = CostTable(case.groups)
    device = ""
    for seed in (None, *SEEDS):
        model = case.model
        counts: dict[str, int] = {}
        if seed is not None:
            model = case.pruned(seed)
            for name, channels in case.kept[seed].items():
                counts[name] = len(channels)
        device, macs = counted_macs(model, case.images(1).shape)
        require(
            costs.params(counts) == n_params(model),
            f"{costs.params(counts)} params, counted {n_params(model)}",
        )
        require(
            costs.macs(counts) == macs,
            f"{costs.macs(counts)} MACs predicted, {macs} counted on {device}",
        )
    return {"costs": "exact", "counted_on": device}


def check_reload(case: Case) -> dict:
    """Files and a fresh network give the pruned one back, bit by bit.

    They hold what runs keep of it: weights, and the modules' attributes that changed.
    """
    pruned = case.pruned(0).eval()
    x = case.images(2)
    torch.manual_seed(1)
    fresh = case.network.build().to(case.dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_file(_tensors_to_save(pruned, fresh), path)
        changes = json.dumps(find_changes(case.model, pruned))
        fit_shapes(fresh, load_file(path))
    set_attributes(fresh, json.loads(changes))
    require(
        torch.equal(outputs(fresh, x), outputs(pruned, x)),
        "the reloaded network's outputs differ",
    )
    return {"reload": "identical"}


def _tensors_to_save(pruned: nn.Module, fresh: nn.Module) -> dict[str, Tensor]:
    """What a run keeps of a network, as safetensors takes it."""
    tensors = saved_tensors(pruned, fresh)
    # Copies, since tied weights share memory, which the format has no word for.
    copies = {name: value.detach().clone() for name, value in tensors.items()}
    return {name: value.contiguous() for name, value in copies.items()}


def check_step(case: Case) -> dict:
    """The pruned network trains.

    It has finite gradients of the right shape wherever the dense network has any.
    """
    pruned = case.pruned(0)
    lacking = without_gradient(pruned, case.images(2))
    if lacking:
        lacking -= without_gradient(copy.deepcopy(case.model), case.images(2))
    require(
        not lacking,
        f"{len(lacking)} parameters without a finite gradient, first: "
        f"{min(lacking, default='')}",
    )
    before = [parameter.detach().clone() for parameter in pruned.parameters()]
    torch.optim.SGD(pruned.parameters(), lr=1e-3).step()
    pairs = zip(before, pruned.parameters(), strict=True)
    is_changed = any(not torch.equal(old, new) for old, new in pairs)
    require(is_changed, "a step of SGD changes nothing")
    outputs(pruned.eval(), case.images(2))
    return {"step": "ok"}


def check_onnx(case: Case) -> dict:
    """ONNX Runtime computes what the pruned network does, at batches of 1 and 4."""
    pruned = case.pruned(0)
    if n_params(pruned) * 4 > MAX_ONNX_BYTES:
        pruned = prune(case.model, case.groups, random_kept(case.groups, 0, 0.1, 0.3))
    x = case.images(1).float()
    # Some networks keep what they compute, and can't be copied if it has gradients.
    with torch.no_grad():
        output = pruned.float().eval()(x)
    if not isinstance(output, Tensor):
        pruned = FirstTensor(pruned).eval()
    with tempfile.TemporaryDirectory() as folder:
        error = export_onnx(pruned, x, Path(folder) / "model.onnx")
    return {"onnx_error": f"{error:.1e}"}


CHECKS: dict[str, Callable[[Case], dict]] = {
    "trace": check_trace,
    "proof": check_proof,
    "equivalence": check_equivalence,
    "zeroed": check_zeroed,
    "costs": check_costs,
    "reload": check_reload,
    "step": check_step,
}


def summary(groups: Groups) -> dict:
    """Number of groups, why some are pinned, and shares of MACs that can go."""
    reasons: Counter[str] = Counter()
    for group in groups.pinned:
        # Reasons may end with a module; those that differ only there count together.
        reasons[re.sub(r" in [\w.]+$", "", group.pinned or "")] += 1
    counted = [f"{count} x {reason}" for reason, count in reasons.most_common()]
    description = describe(groups)
    columns = {
        "macs": description["macs"],
        "groups": len(groups),
        "pinned": len(groups.pinned),
        "reasons": "; ".join(counted),
    }
    for name, value in description.items():
        if name.endswith("_macs_share"):
            columns[name] = round(value, 4)
    return columns


def draw_allocations(case: Case) -> None:
    """Random channels of every group, for each seed."""
    case.kept = {seed: random_kept(case.groups, seed) for seed in SEEDS}


def random_kept(
    groups: Groups, seed: int, low: float = 0.3, high: float = 1.0
) -> dict[str, Tensor]:
    """Random channels of every group, at least one of each.

    Args:
        groups: The network's groups.
        seed: Of the draw.
        low: Least share that is kept.
        high: Largest share that is kept.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in groups:
        share = low + (high - low) * torch.rand((), generator=generator).item()
        count = max(1, round(share * group.channels))
        order = torch.randperm(group.channels, generator=generator)
        kept[group.name] = order[:count].sort().values
    return kept
