"""``weightops env``."""

from __future__ import annotations

import os

from weightops.cli.from_signature import command
from weightops.cli.printing import echo_plan


@command()
def env(*, json_: bool = False) -> None:
    """Show versions, device, threads and folders, for a report of a fault."""
    import platform

    import torch

    from weightops.algebra.devices import pick_device
    from weightops.algebra.precision import pick_precision
    from weightops.support.cache import cache_dir
    from weightops.support.invocation import versions

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    about = {
        **versions(),
        "system": platform.platform(),
        "devices": devices or ["cpu"],
        "precision": pick_precision("auto", pick_device("auto")),
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "cache": str(cache_dir()),
    }
    echo_plan(about, json_)
