"""Names of the files that Google published (github:google-research/vision_transformer): they tell what is inside.

'augreg/R26_S_32-i21k-300ep-...--cifar100-steps_10k-lr_0.003-res_224.npz' -> `read_name` -> `PublishedName` ->
what config.json would say beside the file. gs://, https:// or the name alone -> `url_of` -> where it is downloaded.

The names are of `How to train your ViT?` (AugReg, Steiner et al. 2022, arXiv:2106.10270) and of the first ViT paper
(Dosovitskiy et al. 2021, arXiv:2010.11929), whose files have one name in two folders.
"""

import re
from pathlib import PurePath
from typing import Any, Dict, NamedTuple, Optional, Union
from urllib.parse import quote, unquote, urlparse

BUCKET = 'https://storage.googleapis.com/'
_AUGREG = re.compile(
    r'(?P<architecture>R\d*_(?:Ti|S|B|L)_\d+)-(?P<upstream>i1k|i21k)-(?P<epochs>\d+)ep-lr_[\d.]+-aug_\w+-wd_[\d.]+-'
    r'do_[\d.]+-sd_[\d.]+(?:--(?P<dataset>\w+)-steps_(?P<steps>\w+)-lr_(?P<lr>[\d.]+)-res_(?P<size>\d+))?'
)
_ORIGINAL = re.compile(
    r'(?P<upstream>imagenet21k)(?P<dataset>\+imagenet2012)?/(?P<architecture>R50\+ViT-B_16)(?:-(?P<size>224))?'
)
NUM_CLASSES = {
    **{'i1k': 1000, 'i21k': 21843, 'imagenet21k': 21843, 'imagenet2012': 1000},
    **{'cifar100': 100, 'kitti': 4, 'oxford_iiit_pet': 37, 'resisc45': 45},
}


class PublishedName(NamedTuple):
    """What the name of a published file tells."""

    architecture: str  # Google's name for it
    upstream: str  # the data that it was pretrained on
    dataset: Optional[str] = None  # the data that it was fine-tuned on
    size: Optional[int] = None  # height and width of the images that it was trained on last
    recipe: str = ''  # one sentence

    @property
    def num_classes(self) -> Optional[int]:
        """The classes of the data that it was trained on last; None for data that we do not know."""
        return NUM_CLASSES.get(self.dataset or self.upstream)

    def config(self) -> Dict[str, Any]:
        """Return what timm's config.json would say beside the file.

        For all data but ImageNet, for which timm measured other ways, images are preprocessed as Google's code does for
        evaluation: resized to a square, whatever their shape (vit_jax/input_pipeline.py).
        """
        cfg: Dict[str, Any] = {'input_size': (3, self.size, self.size)} if self.size else {}
        if self.dataset not in (None, 'imagenet2012'):
            cfg.update(crop_pct=1.0, crop_mode='squash', interpolation='bilinear')
        return dict(architecture=self.architecture, pretrained_cfg=cfg)


def read_name(path: Union[str, PurePath]) -> Optional[PublishedName]:
    """Return what the name in a path or URL tells, of the first paper's files with its folder; None for other names."""
    path = unquote(path.as_posix() if isinstance(path, PurePath) else path).removesuffix('.npz')
    folder, _, name = path.rpartition('/')
    if found := _AUGREG.fullmatch(name):
        recipe = f'By its name, it was pretrained on {found["upstream"]} for {found["epochs"]} epochs'
        if found['dataset']:
            recipe += f', and fine-tuned on {found["dataset"]} for {found["steps"]} steps, lr={found["lr"]}'
        size = int(found['size'] or 224)
        return PublishedName(found['architecture'], found['upstream'], found['dataset'], size, f'{recipe}.')
    if found := _ORIGINAL.fullmatch(f'{folder.rpartition("/")[2]}/{name}'):
        dataset = (found['dataset'] or '').removeprefix('+') or None
        size = int(found['size'] or (384 if dataset else 224))
        recipe = f'By its folder, it was pretrained on {found["upstream"]}'
        recipe += f', and fine-tuned on {dataset}.' if dataset else '.'
        return PublishedName(found['architecture'], found['upstream'], dataset, size, recipe)
    return None


def url_of(source: str) -> Optional[str]:
    """Return the address of a published file by its gs:// address or its name alone; None for what is neither.

    A name of the first paper's files begins with its folder: 'imagenet21k/R50+ViT-B_16'.
    """
    if source.startswith('gs://'):
        return BUCKET + quote(source.removeprefix('gs://'))
    if urlparse(source).scheme in ('http', 'https'):
        return source
    if read_name(source) is None:
        return None
    name = source.removesuffix('.npz') + '.npz'
    folder = '' if name.startswith('imagenet21k') else 'augreg/'
    return f'{BUCKET}vit_models/{folder}{quote(name.removeprefix("augreg/"))}'
