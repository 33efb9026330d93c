"""What it costs to find very many images, in a tar archive or in a folder.

    python tests/benchmarks/listing.py tar --images 1000000
    python tests/benchmarks/listing.py folder --images 100000

Makes the images (no pixels, only names and 512 bytes each in the archive), and prints how long they
take to be found, the most memory that takes above what the imports do, the size of the list that is
kept, and what a second process that reads it needs. Each figure is of a process of its own. The
archive takes 1 kB of disk for each image; all is removed in the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_CLASSES = 1000
_AT_ONCE = 10_000  # members that are written together
_MANY = 30_000_000  # images for which the size of a list is told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=("tar", "folder"))
    parser.add_argument("--images", type=int)
    parser.add_argument("--place", help="an existing folder to work in")
    parser.add_argument("--open", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open:
        print(json.dumps(measure(arguments.kind, *arguments.open)))
        return
    images = arguments.images or {"tar": 1_000_000, "folder": 100_000}[arguments.kind]
    with tempfile.TemporaryDirectory(dir=arguments.place) as work:
        path, kept = Path(work) / "images", Path(work) / "images.list"
        began = time.perf_counter()
        if arguments.kind == "tar":
            path = path.with_suffix(".tar")
            write_tar(path, images)
        else:
            write_folder(path, images)
        print(f"{images:,} images in a {arguments.kind}, made in {since(began):.1f} s")
        time.sleep(3)  # a list of folders that have just changed is not relied on
        first, again = (in_a_process(arguments.kind, path, kept) for _ in range(2))
        size = kept.stat().st_size
    print(f"found in         {first['seconds']:.1f} s")
    print(f"most memory      {first['most'] / 1e6:.0f} MB above the imports")
    print(
        f"kept list        {size / 1e6:.1f} MB, {size / images:.0f} bytes an image: "
        f"{size / images * _MANY / 1e9:.1f} GB for {_MANY:,}"
    )
    print(f"opened again in  {again['seconds']:.2f} s")
    print(
        f"second process   {again['own'] / 1e6:.1f} MB of its own and {again['mapped'] / 1e6:.1f} MB "
        "mapped from the list, after every name was read"
    )


def names(images: int) -> Iterator[str]:
    """In the order of a tree, as archives are mostly written."""
    return (f"class{i * _CLASSES // images:03}/image{i:07}.jpg" for i in range(images))


def write_tar(path: Path, images: int) -> None:
    """A ustar archive, made of bytes: ``tarfile`` would take minutes."""
    after = b"0000644\0" + b"0000000\0" * 2 + b"00000001000\0" + b"00000000000\0"  # 512 bytes
    last = b"0" + bytes(100) + b"ustar\x0000" + bytes(512 - 265)
    plain = sum(after) + sum(last) + 8 * 32  # the sum's own field counts as blanks
    body, parts = bytes(512), []
    with open(path, "wb") as file:
        for name in map(str.encode, names(images)):
            total = b"%06o\0 " % (plain + sum(name))
            parts += [name.ljust(100, b"\0"), after, total, last, body]
            if len(parts) >= 5 * _AT_ONCE:
                file.write(b"".join(parts))
                parts.clear()
        file.write(b"".join(parts) + bytes(1024))


def write_folder(path: Path, images: int) -> None:
    made = ""
    for name in names(images):
        folder = name.partition("/")[0]
        if folder != made:
            os.makedirs(path / folder)
            made = folder
        os.close(os.open(f"{path}/{name}", os.O_CREAT | os.O_WRONLY))


def in_a_process(kind: str, path: Path, kept: Path) -> dict[str, float]:
    line = [sys.executable, __file__, kind, "--open", str(path), str(kept)]
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(kind: str, path: str, kept: str) -> dict[str, float]:
    from dino_kit.data.sources.folder import FolderSource
    from dino_kit.data.sources.tar import TarSource

    before = memory()
    began = time.perf_counter()
    source = {"tar": TarSource, "folder": FolderSource}[kind](path, kept)
    seconds, most = since(began), memory()["most"] - before["most"]
    for index in range(len(source)):
        source.key(index)
    now = memory()
    return {"seconds": seconds, "most": most} | {
        name: now[name] - before[name] for name in ("own", "mapped")
    }


def memory() -> dict[str, int]:
    """Bytes of this process: the most until now, those of its own, and those of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    told = {"most": "VmHWM", "own": "RssAnon", "mapped": "RssFile"}
    return {name: int(sizes[key][0]) * 1024 for name, key in told.items()}


def since(began: float) -> float:
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
