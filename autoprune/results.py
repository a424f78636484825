"""What `results.json` of a run holds: one dataclass with a field for each key."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from autoprune.errors import UserError

COST_FIELDS = {
    "macs": "macs",
    "params": "params",
    "memory": "memory_bytes",
    "size": "size_bytes",
}
"""Metric to the field that holds it; `_dense` follows for the dense network."""


@dataclass(frozen=True)
class Results:
    """What a run has decided and measured so far; None where it hasn't got that far.

    Accuracies are shares in [0, 1], losses mean cross-entropies in nats, times seconds
    unless a name says otherwise. MACs, parameters and memory count one sample.
    """

    run: str | None = None
    """Path of the run folder."""
    model: str | None = None
    """Name of the network."""
    data: str | None = None
    """Name of the dataset, or its folder."""
    seed: int | None = None
    """Seed of the search and of the trainings."""
    budget: str | None = None
    """The budget asked for, such as "macs=50%"."""
    budgets: dict[str, dict[str, int]] | None = None
    """Every budgeted metric to its target, the pruned network's cost and the dense
    one's: MACs, parameters, bytes or nanoseconds.
    """
    agent: str | None = None
    """Who decided: an agent, a baseline, or the source of an allocation."""
    method: str | None = None
    """Published method that set the defaults, if one was named."""
    preprocessing: dict[str, Any] | None = None
    """How images become inputs: mean, std, channels, size, interpolation, crop, and
    where these come from.
    """
    remarks: list[str] | None = None
    """What looked wrong, and where the pruned network isn't faster."""
    sparse_method: str | None = None
    """How the network was trained sparsely before the search."""
    sparse_strength: float | None = None
    """Factor of the penalty of that training."""
    sparse_epochs: int | None = None
    """Epochs of that training."""
    widths: dict[str, Any] | None = None
    """What kept channels are multiples of, group by group; and of what that follows:
    the channels that the engine computes at a time (`channels`), the engine, the
    processor.
    """
    reconstructed: bool | None = None
    """Whether the search scored candidates with weights solved anew."""
    baselines: dict[str, dict[str, Any]] | None = None
    """Baseline to its best allocation, scores, reward and number of evaluations."""
    episodes: int | None = None
    """Allocations that the search tried."""
    evaluations: int | None = None
    """Sub-models that the search scored on the proxy split."""
    seconds_search: float | None = None
    """Wall time of the search; of a resumed one its last part."""
    selection_accuracy: float | None = None
    """Of the chosen allocation on the selection split, before fine-tuning."""
    selection_loss: float | None = None
    """Of the chosen allocation on the selection split, before fine-tuning."""
    selection_images: int | None = None
    """Images of the selection split."""
    finalists: list[dict[str, Any]] | None = None
    """The allocations that were compared on the selection split, best first."""
    pareto: str | None = None
    """Path of pareto.json, where a range of budgets was searched."""
    dimensions: dict[str, Any] | None = None
    """Networks that the agent polynomial measured, its optimum, what was built."""
    latency_model: dict[str, Any] | None = None
    """Setting, tile and error of the model by which latency was budgeted."""
    latency_kept: dict[str, Any] | None = None
    """Predicted and measured latency of the chosen allocation, beside its budget."""
    macs: int | None = None
    """Multiply-accumulates of the pruned network."""
    params: int | None = None
    """Parameters of the pruned network."""
    memory_bytes: int | None = None
    """Parameters, buffers and the largest activations of the pruned network."""
    size_bytes: int | None = None
    """The file of the pruned network's weights, at most."""
    macs_dense: int | None = None
    """Multiply-accumulates of the dense network."""
    params_dense: int | None = None
    """Parameters of the dense network."""
    memory_bytes_dense: int | None = None
    """Parameters, buffers and the largest activations of the dense network."""
    size_bytes_dense: int | None = None
    """The file of the dense network's weights, at most."""
    macs_ratio: float | None = None
    """`macs` / `macs_dense`."""
    sparsity: float | None = None
    """Share of the weights that masks remove, where masks were made."""
    groups: list[dict[str, Any]] | None = None
    """Name, size and what is kept of each group, layer or block."""
    pinned: list[dict[str, Any]] | None = None
    """Name, channels and reason of each group that can't be pruned."""
    counted: str | None = None
    """What `groups` counts where that isn't channels: "weights" or "MACs"."""
    removal_method: str | None = None
    """How channels left by training, if they did."""
    accuracy_dense: float | None = None
    """Of the dense network on the test split."""
    accuracy_pruned: float | None = None
    """Of the pruned network on the test split, before fine-tuning."""
    accuracy: float | None = None
    """Of the fine-tuned network on the test split, after the last epoch."""
    test_images: int | None = None
    """Images of the test split."""
    finetune_epochs: int | None = None
    """Epochs of fine-tuning."""
    onnx_max_relative_error: float | None = None
    """Largest difference between ONNX Runtime and PyTorch, relative to the largest
    output.
    """
    latency: list[dict[str, Any]] | None = None
    """Engine, batch, threads, precision, milliseconds of dense and pruned network."""
    latency_setting: dict[str, Any] | None = None
    """Engine, batch, threads and precision of the next two: those that were asked for,
    or others where that engine can't run the network.
    """
    latency_ms: float | None = None
    """Milliseconds of a pass of the pruned network."""
    latency_ms_dense: float | None = None
    """Milliseconds of a pass of the dense network."""
    seconds: dict[str, float] | None = None
    """Stage to its wall time, over all attempts."""
    seconds_total: float | None = None
    """Sum of `seconds`."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Results":
        """The results that a file holds.

        Args:
            values: What `to_json` gave.

        Raises:
            UserError: If there is a key that this version doesn't know.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise UserError(
                "run",
                f"its results.json is of another version (unknown key {unknown[0]!r}); "
                f"start the run anew",
            )
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """What is known so far, as plain data."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def summary(self) -> dict[str, Any]:
        """What is known so far without the long tables, for a line of JSON."""
        values = self.to_json()
        summary = {}
        for name, value in values.items():
            if name == "remarks" or not isinstance(value, list):
                summary[name] = value
        return summary

    def updated(self, **changes: Any) -> "Results":
        """These results with some fields changed; None takes a field out.

        Args:
            **changes: Field to its new value.

        Returns:
            New results.
        """
        return dataclasses.replace(self, **changes)
