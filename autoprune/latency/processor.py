"""What the kernels of CPU engines are made for on this processor."""

import platform

from autoprune.costs.widths import tile_of_processor


def channel_tile() -> int:
    """Channels that kernels of CPU engines compute together.

    The same in bfloat16, whose products oneDNN adds up in float32, in AMX tiles 16 rows
    high as well.
    """
    return tile_of_processor().channels


def processor_name() -> str:
    """The processor's model, for what is stored per machine."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # no Linux
    return platform.processor() or platform.machine()
