"""`python -m pera_fast.stats DIR`: the value range, mean and std of a folder of images, as JSON."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from pera_fast import _cli
from pera_fast.data.sources import DataError, scan
from pera_fast.data.statistics import Statistics, compute_statistics
from pera_fast.files import write_whole


@dataclass(frozen=True)
class Args:
    """Print value range, mean and std per band of a folder of images: JSON to stdout, a table to stderr."""

    dir: Annotated[str, tyro.conf.Positional]
    """Folder of JPEG, PNG, TIFF and GeoTIFF images, at any depth; or one image."""
    bands: tuple[int, ...] | None = None
    """Band numbers from 1, e.g. 4 3 2. Default: the first bands."""
    in_bands: int | None = None
    """Number of bands. Default: as many as --bands names, else 3. Grey images are repeated."""
    nodata: float | None = None
    """Value without data. Default: each file's own tag."""
    max_bad_share: float = 0.1
    """More images that cannot be read than this share are an error."""
    out: str | None = None
    """Also write the JSON to this file."""
    max_windows: int = 512
    """Windows of 256 x 256 pixels to sample."""


def main(args: Args) -> None:
    """Run the command. Raises DataError for what the user can put right."""
    _cli.check_files([args.dir], out=args.out)
    in_bands = args.in_bands if args.in_bands is not None else len(args.bands or (1, 2, 3))
    if args.bands is not None and (len(args.bands) != in_bands or min(args.bands) < 1):
        raise DataError(f"--bands: expected {in_bands} band numbers from 1, got {args.bands}")
    if in_bands < 1 or args.max_windows < 1:
        raise DataError("--in-bands and --max-windows must be at least 1")
    if not 0 <= args.max_bad_share <= 1:
        raise DataError(f"--max-bad-share: expected a share from 0 to 1, got {args.max_bad_share}")
    scenes = scan(args.dir, args.max_bad_share).scenes
    statistics = compute_statistics(
        scenes, bands=args.bands, in_bands=in_bands, nodata=args.nodata, max_windows=args.max_windows,
        max_bad_share=args.max_bad_share,
    )  # fmt: skip
    print(statistics.to_json())
    print(table(statistics), file=sys.stderr)
    if args.out is not None:
        write_whole(args.out, statistics.to_json() + "\n")


def table(statistics: Statistics) -> str:
    """One line per band: the range of each dtype, then mean and std of the scaled values."""
    dtypes = sorted(statistics.low)
    lines = ["band  " + "  ".join(f"{dtype + ' range':>19}" for dtype in dtypes) + "    mean     std"]
    for band, (mean, std) in enumerate(zip(statistics.mean, statistics.std, strict=True)):
        ranges = (f"{statistics.low[d][band]:9.6g} {statistics.high[d][band]:9.6g}" for d in dtypes)
        lines.append(f"{band + 1:4}  " + "  ".join(ranges) + f"  {mean:6.4f}  {std:6.4f}")
    lines.append(f"{statistics.num_pixels} valid pixels in {statistics.num_windows} windows")
    return "\n".join(lines)


if __name__ == "__main__":
    _cli.run(lambda: main(_cli.ask(lambda: tyro.cli(Args, prog="pera_fast.stats"))))
