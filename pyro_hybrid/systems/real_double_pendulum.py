"""A real double pendulum: IBM's recordings of one, as tasks whose relative truth is known."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.interpolate import CubicHermiteSpline
from scipy.signal import savgol_filter
from torch import Tensor

from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.errors import fail, require

__all__ = ["FRAMES", "SHA256", "URL", "Recordings", "angles", "ibm_double_pendulum", "smoothed"]

FRAMES = 400.0  # a second
WINDOW, ORDER = (
    21,
    5,
)  # of the smoother, which so looks 25 ms ahead, half of the yardstick's shortest horizon

URL = "https://dax-cdn.cdn.appdomain.cloud/dax-double-pendulum-chaotic/2.0.1/double-pendulum-chaotic.tar.gz"
ARCHIVE = "4ca743b4b783094693d313ebedc2e8e53cf29821ee8b20abd99f8fb4c0866f8d"
SHA256 = dict(
    enumerate(
        """
    0c02780291f4d19c1e92ad45c0f8e958ae15413def5834b98dd4c6935ad3adbd
    11bc145e34c0745a71881ec48089cda43da2171ee3e4081ba24d335acbfa1f2e
    94d326951762fd133a549a4c8b2de81c97d330e6dbe997407b8b367d7a73c3bd
    3d8e91f8e52cee26de41ae32081aabd9e2463ad423a59e9714d78bb402f48547
    8c20addd10d5ab78df894927ec4ae1a278eaf56d96b1ed3ed49dcbea076217ae
    dbd310a7e512d46b7e9e0d16b932d965746ef46685055fb5031f6ecfa094c465
    79e0a9b415fa6e4e59ce016f2f6fcee759a9a9491d58ffde6e73303eab3f506e
    c16496123e485c4d29d8c62a761e7d889d89a38acb638ee43f087e6ff300df3e
    2ef747e2ba1cf8f31af766a3905632e6efd0e65dd95aca08fdfb546ce8ce38d0
    a32078daa3b914f510dfd5645ad7ca655ac4a736f2423a41606e6030e623427b
    a7042a4efde78b017fcab37defa73624efd92f8bacf1a87085044ccd9b3fdcde
    3e33ed1cc0cd81afd90e4738c51f1801ce4885439b138febf7909578a30b858c
    ccdde6af4e65200389a85480b3a34c183cef5affff4a11f43d81cc565d64fded
    a16d1fbb7da0c8a13a154d75da78f2863ea7aeb32408804537a1f36bf7e8cc44
    bdaaad2e81d70b2cfe9759f4a934153cfd0ac2e8c7d59572e4558c6c80f5840d
    fd93d1a5bf03b9fd3876c3dcf7cda45f3faefd1b7d1e5fa3f1a5ad103915f891
    8698d6df71114b8b15ff2c90b501167baf77072347bd716dbe7f1b472161f4a6
    90347861a2e574935c1cab0ed377cea1196645901aec0484ebdc6e60b13660c8
    980201de83bc13ea932b996e0151060131dbe964aabe4dc7d71fc9dfabb84a72
    5615a0ef2371527a9275986488c30dc180f30ea4011b7d2e6085c07d4d8a849f
    a89ead7ed464e28c04370de80d2011e78c4f213154d37c928cd8a9b4184a6101
""".split()
    )
)


@dataclass(frozen=True, eq=False)
class Recordings:
    """Runs of one double pendulum: ``{number: states (frame, 4)}``, smoothed angles and speeds, 400 frames a second.

    Angles are those of the arms from the vertical, counted on over whole turns, with the speeds after them.
    """

    states: Mapping[int, Tensor]

    @property
    def runs(self) -> tuple[int, ...]:
        """The numbers of the runs."""
        return tuple(sorted(self.states))

    def split(self, held_out: Iterable[int]) -> tuple[Recordings, Recordings]:
        """The runs to learn from, and those held out. Windows of one run are never on both sides.

        >>> recordings = Recordings({run: torch.zeros(100, 4, dtype=torch.float64) for run in range(5)})
        >>> [part.runs for part in recordings.split([3, 4])]
        [(0, 1, 2), (3, 4)]
        """
        apart = set(held_out)
        require(
            apart < set(self.states) and len(apart) > 0,
            f"some of the runs {self.runs} to hold out, and not all",
            sorted(apart),
            "Leave a run or more to each side.",
        )
        return (
            Recordings({run: self.states[run] for run in self.runs if run not in apart}),
            Recordings({run: self.states[run] for run in sorted(apart)}),
        )

    def tasks(
        self,
        tasks: int,
        shots: int,
        seed: int,
        *,
        step: float = 0.01,
        points: int = 50,
        scale: tuple[float, float] = (0.7, 1.4),
        num_support: int | None = None,
    ) -> Tasks:
        r"""Tasks of all these runs, each with a clock of its own that runs :math:`s` times as fast.

        A pendulum filmed by such a clock is another one, whose :math:`g/l` is :math:`s^2` times and whose friction
        :math:`s` times that of the real one: ``truth`` is ``{"scale": s, "gravity": s²}``. The two angles are
        observed; the measured states at all times are the angles and the smoother's speeds. The windows of a task are
        drawn from all runs and have no frame in common, not even one that the smoother looked at.

        Arguments:
            tasks, shots: how many, and windows in each; half of these are support unless ``num_support`` is given.
            seed: of the scales and the windows.
            step, points: time between two observations, by the task's clock, and their number.
            scale: smallest and largest :math:`s`, uniform between; ``(1.0, 1.0)`` for the pendulum as it is.
        """
        require(
            tasks >= 1 and shots >= 2,
            "at least one task of two shots",
            f"{tasks} of {shots}",
            "One shot conditions the prior, another is to be explained.",
        )
        require(
            step > 0.0 and points >= 2,
            "a positive step and two points or more",
            f"{step} and {points}",
            "Windows last scale * step * (points - 1) seconds of a run.",
        )
        require(
            0.0 < scale[0] <= scale[1],
            "scales between two positive numbers, the smaller first",
            scale,
            "Pass (1.0, 1.0) for the pendulum as it is.",
        )
        random = torch.Generator().manual_seed(seed)
        scales = scale[0] + (scale[1] - scale[0]) * torch.rand(
            tasks, generator=random, dtype=torch.float64
        )
        clock = step * torch.arange(points, dtype=torch.float64)
        curves = {run: _curve(states) for run, states in self.states.items()}
        states = torch.stack(
            [
                torch.stack(
                    [
                        _seen(curves[run], start + s * clock, s)
                        for run, start in self._windows(shots, float(s * clock[-1]), random)
                    ]
                )
                for s in scales
            ]
        ).float()
        truth = {
            "scale": scales.float().unsqueeze(-1),
            "gravity": scales.square().float().unsqueeze(-1),
        }
        return Tasks.from_trajectories(
            clock.float(),
            states[..., :2].contiguous(),
            initial=states,
            num_support=shots // 2 if num_support is None else num_support,
            true_latents=truth,
        )

    def _windows(
        self, number: int, seconds: float, random: torch.Generator
    ) -> list[tuple[int, float]]:
        """Runs and starting times of windows that share nothing, the first of each run at a random time."""
        places, apart = [], seconds + WINDOW / FRAMES
        for run in self.runs:
            room = (len(self.states[run]) - 1) / FRAMES - seconds
            first = min(apart, max(room, 0.0)) * float(torch.rand((), generator=random))
            places += [
                (run, first + k * apart) for k in range(int((room - first) / apart + 1.0 + 1e-9))
            ]
        require(
            len(places) >= number,
            f"room for {number} windows of {seconds:.3g} s in the runs {self.runs}",
            f"room for {len(places)}",
            "Ask for fewer shots, shorter windows or more runs.",
        )
        return [places[k] for k in torch.randperm(len(places), generator=random)[:number].tolist()]


def _curve(states: Tensor) -> CubicHermiteSpline:
    return CubicHermiteSpline(
        np.arange(len(states)) / FRAMES, states[:, :2].numpy(), states[:, 2:].numpy()
    )


def _seen(curve: CubicHermiteSpline, times: Tensor, scale: Tensor) -> Tensor:
    """States (time, 4) by a clock that runs ``scale`` times as fast, with whole turns before the start forgotten."""
    turned = torch.from_numpy(curve(times.numpy()))
    whole = 2.0 * torch.pi * torch.round(turned[0] / (2.0 * torch.pi))
    return torch.cat([turned - whole, scale * torch.from_numpy(curve(times.numpy(), 1))], -1)


def angles(pixels: Tensor) -> Tensor:
    """Angles (frame, 2) of the upper and the lower arm from the vertical, of rows of (y, x) of red, green and blue.

    Zero is hanging down and y points down in the picture. The camera's scale, another in runs 0 and 1, drops out.

    >>> angles(torch.tensor([[0, 0, 589, 0, 589, 450]]))
    tensor([[0.0000, 1.5708]], dtype=torch.float64)
    """
    require(
        pixels.dim() == 2 and pixels.shape[1] == 6 and len(pixels) > 0,
        "rows of six numbers",
        tuple(pixels.shape),
        "Give (y, x) of the red, the green and the blue marker in each row.",
    )
    red, green, blue = pixels.double().split(2, -1)
    arms = torch.stack([green - red, blue - green])
    return torch.from_numpy(np.unwrap(torch.atan2(arms[..., 1], arms[..., 0]).T.numpy(), axis=0))


def smoothed(angles: Tensor) -> Tensor:
    """States (frame, 4) from measured angles (frame, 2), by Savitzky and Golay's filter.

    A polynomial of degree 5 is fitted to the 21 frames around each (52 ms), and gives the angle and the speed in the
    middle. Angles are measured to about 0.001 rad, so that the speeds' standard deviation is about 0.08 rad/s.
    """
    require(len(angles) >= WINDOW, f"{WINDOW} frames or more", len(angles), "Record for longer.")
    parts = [
        savgol_filter(angles.numpy(), WINDOW, ORDER, deriv=k, delta=1.0 / FRAMES, axis=0)
        for k in (0, 1)
    ]
    return torch.from_numpy(np.concatenate(parts, -1))


def ibm_double_pendulum(folder: str | Path | None = None) -> Recordings:
    """The recorded runs of IBM's double pendulum, each file checked by its sha256.

    They are found in ``folder``, else in the one that the environment variable ``PYRO_HYBRID_DATA`` names, as ``0.csv``
    to ``20.csv`` (some may be missing); else they are downloaded with pooch (``pip install pyro_hybrid[data]``).
    The data's licence is CDLA-Sharing-1.0.

    References:
        Learning beyond simulated physics (Asseman, Kornuta & Ozcan, 2018), https://openreview.net/pdf?id=HylajWsRF7
    """
    named = folder or os.environ.get("PYRO_HYBRID_DATA")
    place = Path(named) if named else _downloaded()
    found = [run for run in SHA256 if (place / f"{run}.csv").is_file()]
    if not found:
        fail(
            "a folder with the runs 0.csv to 20.csv",
            f"none of them in {place}",
            "Pass folder= or set PYRO_HYBRID_DATA.",
            FileNotFoundError,
        )
    return Recordings(
        {run: smoothed(angles(_pixels(place / f"{run}.csv", SHA256[run]))) for run in found}
    )


def _pixels(path: Path, sha256: str) -> Tensor:
    came = hashlib.sha256(path.read_bytes()).hexdigest()
    require(
        came == sha256,
        f"{path} with sha256 {sha256}",
        came,
        "Fetch the file again: it isn't the published one.",
    )
    return torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.int64, ndmin=2))


def _downloaded() -> Path:
    """The folder where the published archive was unpacked, now or before."""
    try:
        import pooch
    except ImportError:
        fail(
            "pooch, to download the recordings",
            "none",
            "pip install 'pyro_hybrid[data]', or pass folder= or set PYRO_HYBRID_DATA.",
            ImportError,
        )
    try:
        archive = Path(pooch.retrieve(URL, known_hash=ARCHIVE, path=pooch.os_cache("pyro_hybrid")))
    except (OSError, ValueError) as error:  # no network, or another file
        raise ConnectionError(
            f"expected the recordings from {URL}; got {error}. Fetch them elsewhere (their sha256 "
            "are known), and pass folder= or set PYRO_HYBRID_DATA."
        ) from error
    folder = archive.with_name("ibm_double_pendulum")
    if not all((folder / f"{run}.csv").exists() for run in SHA256):
        folder.mkdir(exist_ok=True)
        _unpack(archive, folder)
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    """The runs alone, by their names and nothing else that the archive says."""
    names = {f"{run}.csv" for run in SHA256}
    with tarfile.open(archive) as tar:
        for member in tar:
            *_, above, name = ("", *member.name.split("/"))
            content = (
                tar.extractfile(member) if above == "dpc_dataset_csv" and name in names else None
            )
            if content is not None:
                part = folder / f"{name}.part"
                part.write_bytes(content.read())
                part.replace(folder / name)
