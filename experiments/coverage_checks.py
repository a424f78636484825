"""What has to hold for every network: a table of checks, each a small function from a
case to columns of the table.

A check raises where something is wrong; `measure` catches that, so that one failure
doesn't hide the others.
"""

import copy
import re
import resource
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from autoprune.costs.cost import CostTable
from autoprune.deploy.export import MAX_ONNX_BYTES, WEIGHTS, export_onnx, save_pruned
from autoprune.structure.groups import Groups, positions, removed, tensors_in
from autoprune.structure.slicing import fit_shapes, prune
from autoprune.tracing.masking import mask
from autoprune.tracing.trace import describe, trace
from experiments.coverage_networks import FirstTensor, Network, example, randomise

SEEDS = (0, 1)
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
SMALLEST_CHANGE = 1e-3
# Dense, masked and pruned copies of larger networks don't fit the memory of a small
# machine in float64.
MAX_DOUBLE_PARAMS = 320_000_000
LIMIT_S = 1800
# Operations that read channels without weights of their own: zeros in the weights
# before them don't hide a channel.
NOT_ZEROED = {
    *(
        "native_layer_norm",
        "native_group_norm",
        "_softmax",
        "linalg_vector_norm",
        "bmm",
        "baddbmm",
        "var",
        "std",
    ),
    *(
        "var_mean",
        "_native_multi_head_attention",
        "_transformer_encoder_layer_fwd",
        "_fused_rms_norm",
    ),
    *(
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_attention_math",
    ),
}
STATUS, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class CheckError(Exception):
    """Something that has to hold doesn't."""


@dataclass
class Case:
    """One network with random values, ready to be checked. `groups` is set by the first
    check.
    """

    network: Network
    model: nn.Module
    size: int
    dtype: torch.dtype
    groups: Groups | None = None
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def images(self, batch: int) -> Tensor:
        return example((batch, 3, self.size, self.size), self.dtype, seed=1)

    def pruned(self, seed: int) -> nn.Module:
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
    """Runs all checks one by one. Yields the columns that each fills; `failures` where
    it fails.
    """
    dtype = str(case.dtype).removeprefix("torch.")
    yield {"size": case.size, "params": n_params(case.model), "dtype": dtype}
    for name, check in CHECKS.items():
        try:
            with time_limit(limit_s), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield check(case)
        except (
            Exception
        ) as error:  # whatever the network, the tracer or the exporter raises
            yield {"failures": f"{name}: {describe_error(error)}"}
            if case.groups is None:
                break
    yield {"seconds": round(time.process_time(), 1)}


def check_trace(case: Case) -> dict:
    """Groups found from labels alone."""
    with Usage() as usage:
        case.groups = trace(case.model, case.images(1), verify=False)
    draw_allocations(case)
    return {
        "trace_seconds": usage.seconds,
        "trace_mib": usage.mib,
        **summary(case.groups),
    }


def check_proof(case: Case) -> dict:
    """Groups after their numerical proof: those that users get, and that the other
    checks are about.
    """
    with Usage() as usage:
        case.groups = trace(case.model, case.images(1))
    draw_allocations(case)
    return {
        "proof_seconds": usage.seconds,
        "proof_mib": usage.mib,
        **summary(case.groups),
    }


def check_equivalence(case: Case) -> dict:
    """Pruned equals masked, and masking changes the output."""
    x, errors, changes = case.images(2), [], []
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
    """Pruned equals a dense copy with zeros in the weights that read removed channels,
    which owes nothing to labels.

    Only where every reader has such weights; keeping all channels has to be the
    identity everywhere.
    """
    x, everything = (
        case.images(2),
        {group.name: torch.arange(group.channels) for group in case.groups},
    )
    same = difference(
        outputs(prune(case.model, case.groups, everything), x), outputs(case.model, x)
    )
    require(
        same < TOLERANCE[case.dtype],
        f"keeping every channel changes the output by {same:.1e}",
    )
    if operations(case.model, x) & NOT_ZEROED:
        return {"zeroed_error": "not comparable"}
    errors = [
        difference(
            outputs(case.pruned(s), x),
            outputs(zeroed(case.model, case.groups, case.kept[s]), x),
        )
        for s in SEEDS
    ]
    require(
        max(errors) < TOLERANCE[case.dtype],
        f"pruned and zeroed weights differ by {max(errors):.1e}",
    )
    return {"zeroed_error": f"{max(errors):.1e}"}


def check_costs(case: Case) -> dict:
    """Predicted MACs and parameters are those of the pruned network, dense network
    included.
    """
    costs, device = CostTable(case.groups), ""
    for seed in (None, *SEEDS):
        model = case.model if seed is None else case.pruned(seed)
        counts = (
            {}
            if seed is None
            else {name: len(channels) for name, channels in case.kept[seed].items()}
        )
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
    """Weights in a file and a fresh network give the pruned one back, bit by bit."""
    pruned, x = case.pruned(0).eval(), case.images(2)
    torch.manual_seed(1)
    fresh = case.network.build().to(case.dtype)
    with tempfile.TemporaryDirectory() as folder:
        save_pruned(pruned, Path(folder), {"model": case.network.name})
        fit_shapes(fresh, load_file(Path(folder) / WEIGHTS))
    require(
        torch.equal(outputs(fresh, x), outputs(pruned, x)),
        "the reloaded network's outputs differ",
    )
    return {"reload": "identical"}


def check_step(case: Case) -> dict:
    """The pruned network trains: finite gradients of the right shape wherever the dense
    network has any.
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
    changed = any(
        not torch.equal(a, b) for a, b in zip(before, pruned.parameters(), strict=True)
    )
    require(changed, "a step of SGD changes nothing")
    outputs(pruned.eval(), case.images(2))
    return {"step": "ok"}


def check_onnx(case: Case) -> dict:
    """ONNX Runtime computes what the pruned network does, at batches of 1 and 4."""
    pruned = case.pruned(0)
    if n_params(pruned) * 4 > MAX_ONNX_BYTES:
        pruned = prune(case.model, case.groups, random_kept(case.groups, 0, 0.1, 0.3))
    x = case.images(1).float()
    with torch.no_grad():  # some networks keep what they compute here, and can't be copied if it has gradients
        output = pruned.float().eval()(x)
    if not isinstance(output, Tensor):
        pruned = FirstTensor(pruned).eval()
    with tempfile.TemporaryDirectory() as folder:
        return {
            "onnx_error": f"{export_onnx(pruned, x, Path(folder) / 'model.onnx'):.1e}"
        }


CHECKS: dict[str, Callable[[Case], dict]] = {
    "trace": check_trace,
    "proof": check_proof,
    "equivalence": check_equivalence,
    "zeroed": check_zeroed,
    "costs": check_costs,
    "reload": check_reload,
    "step": check_step,
    "onnx": check_onnx,
}


def summary(groups: Groups) -> dict:
    """Number of groups, why some are pinned, and the shares of MACs that pruning
    reaches.
    """
    # Reasons may end with a module; those that differ only there are counted together.
    reasons = Counter(
        re.sub(r" in [\w.]+$", "", group.pinned) for group in groups.pinned
    )
    found = describe(groups)
    shares = {
        name: value for name, value in found.items() if name.endswith("_macs_share")
    }
    return {
        "macs": found["macs"],
        "groups": len(groups),
        "pinned": len(groups.pinned),
        "reasons": "; ".join(
            f"{count} x {reason}" for reason, count in reasons.most_common()
        ),
        **{name: round(value, 4) for name, value in shares.items()},
    }


def draw_allocations(case: Case) -> None:
    """Random channels of every group, for each seed."""
    case.kept = {seed: random_kept(case.groups, seed) for seed in SEEDS}


def random_kept(
    groups: Groups, seed: int, low: float = 0.3, high: float = 1.0
) -> dict[str, Tensor]:
    """Of every group a random share between `low` and `high`, at least one channel."""
    generator, kept = torch.Generator().manual_seed(seed), {}
    for group in groups:
        share = low + (high - low) * torch.rand((), generator=generator).item()
        count = max(1, round(share * group.channels))
        kept[group.name] = (
            torch.randperm(group.channels, generator=generator)[:count].sort().values
        )
    return kept


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """Everything that the network returns, as one vector."""
    with torch.no_grad():
        return torch.cat([tensor.flatten() for tensor in tensors_in(model(x))])


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value of `b`; infinite where values
    aren't finite.
    """
    require(
        a.shape == b.shape,
        f"the output's shape {tuple(a.shape)} isn't {tuple(b.shape)}",
    )
    error = ((a - b).abs().max() / b.abs().max()).item()
    return error if error == error else float("inf")


def zeroed(model: nn.Module, groups: Groups, kept: dict[str, Tensor]) -> nn.Module:
    """A dense copy with zeros in all weights that read a removed channel."""
    twin = copy.deepcopy(model)
    tensors = twin.state_dict()
    for group in groups:
        for member in group.consumers:
            tensors[member.tensor].index_fill_(
                member.axis, positions(member, removed(group, kept)), 0
            )
    return twin


def operations(model: nn.Module, x: Tensor) -> set[str]:
    """Names of the ATen operations in a forward pass."""
    with _Names() as names, torch.no_grad():
        model(x)
    return names.seen


class _Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def n_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def counted_macs(model: nn.Module, shape: torch.Size) -> tuple[str, int]:
    """What PyTorch counts for one sample: without computing it if the forward pass
    reads no values. And where.
    """
    for device in ("meta", "cpu"):
        plain = (
            copy.deepcopy(model).float().requires_grad_(False)
        )  # else the counter hooks into backward passes
        try:
            x = torch.zeros(shape, device=device)
            with (
                FlopCounterMode(display=False) as counter,
                torch.no_grad(),
                plain_attention(),
            ):
                plain.to(device)(x)
            return device, counter.get_total_flops() // 2
        except (
            RuntimeError,
            NotImplementedError,
        ):  # index tensors and plain attributes can't be read on meta
            continue
    raise CheckError("the network can't be counted")


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as the matrix products that it consists of: the fused kernels aren't
    counted.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def without_gradient(model: nn.Module, x: Tensor) -> set[str]:
    """Names of the parameters that a backward pass in training mode leaves without a
    finite gradient.
    """
    model.train().requires_grad_(True)
    torch.manual_seed(0)
    torch.stack(
        [tensor.square().mean() for tensor in tensors_in(model(x))]
    ).sum().backward()
    return {
        name
        for name, parameter in model.named_parameters()
        if not _has_gradient(parameter)
    }


def _has_gradient(parameter: nn.Parameter) -> bool:
    grad = parameter.grad
    return (
        grad is not None
        and grad.shape == parameter.shape
        and bool(torch.isfinite(grad).all())
    )


def require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckError(message)


def describe_error(error: Exception) -> str:
    """Type and first line, for a cell of a table."""
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return text if isinstance(error, CheckError) else f"{type(error).__name__}: {text}"


class Usage:
    """CPU seconds of what runs inside (other programs on the machine don't count), and
    its peak of memory in MiB.
    """

    def __enter__(self) -> "Usage":
        if STATUS.exists():
            RESET_PEAK.write_text("5")
        self._before, self._started = self._resident("VmRSS"), time.process_time()
        return self

    def __exit__(self, *_) -> None:
        self.seconds = round(time.process_time() - self._started, 2)
        self.mib = round(self._resident("VmHWM") - self._before)

    @staticmethod
    def _resident(field_name: str) -> float:
        if not STATUS.exists():  # no Linux: the peak of the whole process so far
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        line = next(
            line
            for line in STATUS.read_text().splitlines()
            if line.startswith(field_name)
        )
        return int(line.split()[1]) / 2**10


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises a TimeoutError inside after so many CPU seconds."""

    def stop(*_) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
