"""How fast a device multiplies matrices."""

import time

import torch

from fingpt_lightning.low_rank.cpu_products import faster_products


@faster_products()
def measured_peak_flops_per_s(
    device: torch.device, dtype: torch.dtype, seconds: float = 0.2
) -> float:
    """The best rate of square matrix products that this device reached within some seconds.

    A measured stand-in for a data sheet's peak, which CPUs lack: under load it comes out low.
    The global random state is left as it is.

    Args:
        device: Device that multiplies.
        dtype: Type of the matrices.
        seconds: Duration of the trials, above 0; three products are made in any case.

    Raises:
        ValueError: ``seconds`` is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"seconds={seconds} is outside (0, inf)")
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(size, size, device=device, generator=generator).to(dtype)
    times_s: list[float] = []
    with torch.no_grad():
        torch.mm(x, x)
        while len(times_s) < 3 or sum(times_s) < seconds:
            _synchronize(device)
            started_s = time.perf_counter()
            torch.mm(x, x)
            _synchronize(device)
            times_s.append(time.perf_counter() - started_s)
    return 2 * size**3 / min(times_s)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
