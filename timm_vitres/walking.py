"""Images on disk: what is one, and all of them below a folder, however deep.

folder -> `find_images` -> its images, and what is left out and why. `folders` says which class each of them is of.
"""

import errno
import heapq
import itertools
import os
import re
import stat
from pathlib import Path
from typing import Any, Dict, FrozenSet, Iterable, List, NamedTuple, Tuple, Union

from PIL import Image, ImageFile
from tqdm import tqdm

from .labels import printable

# Operating systems add these folders; the thumbnails in them are images.
SYSTEM_FOLDERS = ('__MACOSX', '@eaDir', '$RECYCLE.BIN', 'System Volume Information', 'lost+found')
MOST_COUNTED = 10000  # files in a folder that is left out
# Pillow recognises MPEG, but decodes none of its files; EPS is a program, which Ghostscript would run
UNDECODABLE = ('MPEG', 'EPS')
Identity = Tuple[int, int]  # device and inode


class File(NamedTuple):
    """What one call of `os.stat` says of an image; on a network each call takes long."""

    size: int  # bytes
    identity: Identity


class Found(NamedTuple):
    """What is in a folder, however deep: images in natural order, and the reason for each path that is left out."""

    images: List[str]
    left_out: Dict[str, str]
    same: Dict[str, str]  # a path left out since it leads to the same file as another -> that other path
    files: Dict[str, File]  # an image's path -> its file


def shown(path: Union[str, Path]) -> str:
    """Return a path as it can be printed on one line; see `printable`."""
    return printable(str(path))


def natural_order(name: str) -> Tuple[list, str]:
    """Return a sort key: timm's `natural_key` (numbers by value, case ignored), then the name itself."""
    parts: list = re.split(r'(\d+)', name.lower())
    parts[1::2] = [int(number) for number in parts[1::2]]
    return parts, name


def image_formats() -> List[str]:
    """Return Pillow's names of the formats that an image may have, registered plug-ins included."""
    Image.init()
    return [name for name in Image.ID if name not in UNDECODABLE]


def image_suffixes() -> FrozenSet[str]:
    """Return the suffixes, in lower case, of the formats that Pillow decodes here, registered plug-ins included."""
    suffixes = Image.registered_extensions()  # this call imports Pillow's own plug-ins
    decoders = {name: factory for name, (factory, _) in Image.OPEN.items() if name not in UNDECODABLE}
    kinds = {name: factory for name, factory in decoders.items() if isinstance(factory, type)}
    stubs = {name for name, kind in kinds.items() if issubclass(kind, ImageFile.StubImageFile)}
    return frozenset(suffix.lower() for suffix, name in suffixes.items() if name in decoders.keys() - stubs)


def find_images(root: Union[str, Path], strict: bool = True) -> Found:
    """Find all images below a folder. Links to folders are followed once; a file or folder is never taken twice.

    Args:
        strict: Whether a folder or an image that can't be read is an error, or left out.

    Raises:
        OSError: for the first that can't be read; the message names it.
    """
    return _Walk(str(Path(root)), strict).found()


def below(root: Union[str, Path], paths: Iterable[str]) -> List[str]:
    """Return paths that `find_images` found in a folder, relative to that folder, or to one above it: `root`."""
    start = 0 if str(Path(root)) == '.' else len(os.path.join(Path(root), ''))
    return [path[start:] for path in paths]


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is the system's, by its name."""
    return name.startswith('.') or name in SYSTEM_FOLDERS


def _identity(info: os.stat_result) -> Identity:
    return info.st_dev, info.st_ino


def _place(folder: Union[str, Path]) -> Any:
    """Return what tells a folder from all others, by whatever links it is reached."""
    identity = _identity(os.stat(folder))
    return identity if identity[1] else os.path.realpath(folder)  # a file system without inodes says 0


class _Walk:
    """A walk through a folder: real folders come first, then sorted links, so that the result is always the same."""

    def __init__(self, root: str, strict: bool = True):
        self.root, self.strict = root, strict
        self.suffixes = image_suffixes()
        self.left_out: Dict[str, str] = {}
        self.files: List[Tuple[bool, str, File]] = []  # (whether a link leads to it, path, file)
        self.folders = [root]
        self.links: List[str] = []
        self.seen: Dict[Any, str] = {}
        self.above = {_place(parent) for parent in Path(root).resolve().parents}

    def found(self) -> Found:
        linked = False
        with tqdm(desc='looking for images', unit=' images', leave=False, delay=5) as bar:
            while self.folders or self.links:
                linked = linked or not self.folders
                self._read(self.folders.pop() if self.folders else heapq.heappop(self.links), linked)
                bar.update(len(self.files) - bar.n)
        first: Dict[Identity, str] = {}
        same: Dict[str, str] = {}
        files: Dict[str, File] = {}
        for _, path, file in sorted(self.files):
            identity = file.identity
            if identity[1] and identity in first:  # a file system without inodes says 0
                same[path] = first[identity]
                self.left_out[path] = f'the same file as {shown(first[identity])}'
            else:
                first[identity] = path
                files[path] = file
        return Found(sorted(files, key=natural_order), self.left_out, same, files)

    def _read(self, folder: str, linked: bool) -> None:
        try:
            place = _place(folder)
            if place in self.above or place in self.seen:
                self.left_out[folder] = self._circle(folder, place)
                return
            self.seen[place] = folder
            with os.scandir(folder) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if not self.strict:
                self.left_out[folder] = str(error.strerror)
                return
            raise type(error)(f'the folder {shown(folder)} cannot be read ({error.strerror}).') from error
        start = '' if folder == '.' else os.path.join(folder, '')  # pathlib would take most of a walk's time
        for entry in inside:
            self._sort_in(start + entry.name, entry, linked)

    def _circle(self, folder: str, place: Any) -> str:
        before = self.seen.get(place)
        if before is None or Path(before) in Path(folder).parents:
            return 'a link that leads in a circle'
        return f'a link to {shown(before)}, which is read already'

    def _sort_in(self, path: str, entry: os.DirEntry, linked: bool) -> None:
        is_link = entry.is_symlink()
        try:
            info = os.stat(path)
        except OSError as error:
            leads_nowhere = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
            if is_link and (leads_nowhere or getattr(error, 'winerror', None) == 1921):  # Windows' circle of links
                self.left_out[path] = f'a link to nothing ({shown(os.readlink(path))})'
            elif (
                not self.strict
                or is_hidden(entry.name)
                or not (is_link or self._is_image(entry.name) or entry.is_dir(follow_symlinks=False))
            ):
                self.left_out[path] = str(error.strerror)
            else:
                raise type(error)(f'{shown(path)} cannot be read ({error.strerror}).') from error
            return
        if stat.S_ISDIR(info.st_mode):
            if is_hidden(entry.name):
                self.left_out[path] = f'hidden{count_files(path)}'
            elif is_link:
                heapq.heappush(self.links, path)
            else:
                self.folders.append(path)
        elif not stat.S_ISREG(info.st_mode):
            self.left_out[path] = 'no regular file'
        elif is_hidden(entry.name):
            self.left_out[path] = 'hidden'
        elif not self._is_image(entry.name):
            self.left_out[path] = 'no image, by its suffix'
        else:
            self.files.append((linked or is_link, path, File(info.st_size, _identity(info))))

    def _is_image(self, name: str) -> bool:
        return os.path.splitext(name)[1].lower() in self.suffixes


def count_files(folder: str) -> str:
    """Return in words how many files a folder holds, however deep; nothing of a link."""
    if os.path.islink(folder):
        return ''
    # caches of other programs (.dvc, .git/annex) may hold millions
    files = itertools.islice((name for _, _, names in os.walk(folder) for name in names), MOST_COUNTED)
    count = sum(1 for _ in files)
    return f', with {count} file{"s" * (count != 1)}{" or more" * (count == MOST_COUNTED)}'


def public_name(dataset: str) -> str:
    """Return a dataset's name without the place of a folder on this machine, which is nobody's business."""
    prefix, _, rest = dataset.partition('/')
    return f'{prefix}/{shown(os.path.basename(rest.rstrip("/")))}' if os.path.isabs(rest) else dataset
