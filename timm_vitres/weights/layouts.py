"""Conversion of state dicts from the layouts of others, `LAYOUTS`, to ours.

Our layout of the serial family is timm's.

state dict of any layout -> `find_layout` (by its keys) -> `convert_layout` -> names and shapes as in our models.
"""

import logging
import re
from collections import Counter
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
from timm.models import clean_state_dict

_logger = logging.getLogger(__name__)

StateDict = Dict[str, torch.Tensor]
# a training checkpoint has its weights under one of these keys; averaged weights come first
WRAPPERS = ('state_dict_ema', 'model_ema', 'state_dict', 'model_state_dict', 'model')
HALVES = (torch.float16, torch.bfloat16)
PREFIXES = ('model.', 'net.', 'backbone.', 'timm_model.')  # of a module that held the model, such as Lightning's

# torch.compile, FSDP and activation checkpointing of single modules put these into names
INNER_WRAPPERS = r'(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+'
MARKS = r'patch_embed\.|stem\.|trans_patch_conv\.|conv1\.'  # how a name of our models, or of a layout, may begin


class Layout(NamedTuple):
    """A layout of state dicts: the name of its writer, a key that only it has, and its conversion to ours.

    `left_out` names the parts of its models that ours do not have, such as a depth decoder.
    """

    name: str
    key: str  # a regular expression for a key that no other layout has
    convert: Callable[[StateDict], StateDict]
    left_out: str = r'(?!)'  # a regular expression for the beginning of keys; this one matches nothing
    published: str = r'(?!)'  # a regular expression for the names of the files that its writers published
    license: Optional[str] = 'apache-2.0'  # of those; the tensors of a layout may be anybody's
    model_type: Optional[str] = None  # in a config.json of transformers


def convert_layout(state_dict: Dict[str, Any]) -> StateDict:
    """Return a state dict unwrapped, and converted from any of `LAYOUTS` to our layout.

    A warning counts and names what is left out since it is another part's, such as a depth decoder's.

    Raises:
        ValueError: for anything but a dict of names with tensors.
        RuntimeError: where the names are those of a layout, but the shapes are not.
    """
    for wrapper in WRAPPERS:
        if isinstance(state_dict.get(wrapper), dict):
            return convert_layout(state_dict[wrapper])
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f'state_dict: {key!r:.80} has {type(value).__name__}, expected names with tensors.')
    state_dict = plain_names(state_dict)
    layout = find_layout(state_dict)
    state_dict = _leave_out(state_dict, layout)
    try:
        return layout.convert(state_dict)
    except (IndexError, RuntimeError) as error:
        raise RuntimeError(
            f'The checkpoint has the names of the {layout.name} layout, but not its shapes ({error}).'
        ) from error


def plain_names(state_dict: StateDict) -> StateDict:
    """Return a state dict without what wrappers add to names: DDP, torch.compile, averages, or a module that held the
    model, with whatever else that held, which a warning counts and names.
    """
    state_dict = {
        re.sub(INNER_WRAPPERS, r'\1', key): value
        for key, value in clean_state_dict(state_dict).items()
        if key != 'n_averaged'
    }
    if find_layout(state_dict) is not TIMM or any(re.match(MARKS, key) for key in state_dict):
        return state_dict
    for prefix in PREFIXES:
        inner = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        found = plain_names(inner) if inner else {}
        if len(inner) < len(state_dict):  # a loss with weights, perhaps, stood beside the model
            if find_layout(found) is TIMM and not any(re.match(MARKS, key) for key in found):
                continue
            others = Counter(key.partition('.')[0] for key in state_dict if not key.startswith(prefix))
            parts = ', '.join(f'{part} ({count})' for part, count in sorted(others.items()))
            _logger.warning('state_dict: what stands beside %s* is left out: %s.', prefix, parts)
        if found:
            return found
    return state_dict


def widened(state_dict: Dict[str, Any], dtype: torch.dtype) -> Dict[str, Any]:
    """Return a state dict whose numbers of 16 bits have a model's dtype, if that is wider.

    A table that is resampled, or a convolution that is adapted, would else be rounded to 16 bits a second time.
    """
    if dtype in HALVES:
        return state_dict
    return {
        key: value.to(dtype) if torch.is_tensor(value) and value.dtype in HALVES else value
        for key, value in state_dict.items()
    }


def find_layout(state_dict: StateDict) -> Layout:
    """Return the layout that one of the keys marks, or timm's if none does."""
    for layout in LAYOUTS:
        if any(re.search(layout.key, key) for key in state_dict):
            return layout
    return TIMM


def _leave_out(state_dict: StateDict, layout: Layout) -> StateDict:
    """Return a state dict without the tensors of the layout's other parts, which a warning counts and names."""
    others = {key: found[0] for key in state_dict if (found := re.match(layout.left_out, key))}
    if others:
        parts = ', '.join(f'{part} ({count})' for part, count in sorted(Counter(others.values()).items()))
        _logger.warning('%s: %d tensors of other parts are left out: %s.', layout.name, len(others), parts)
    return {key: value for key, value in state_dict.items() if key not in others}


def from_timm(state_dict: StateDict) -> StateDict:
    """Leave out the representation layer before the head, which old files of timm's may still hold."""
    return _without_pre_logits(state_dict, 'pre_logits.', 'head.')


def _without_pre_logits(state_dict: StateDict, layer: str, head: str) -> StateDict:
    """Leave out the layer before the head, and a head that learnt behind it: without it, its answers mean nothing."""
    if not any(key.startswith(layer) for key in state_dict):
        return state_dict
    learnt = [key for key in state_dict if key.startswith(head)]
    learnt = learnt if any(state_dict[key].any() for key in learnt) else []
    if learnt:
        text = 'pre_logits: our models have no such layer; it is left out, and the head behind it, too: %s.'
        _logger.warning(text, ', '.join(sorted(learnt)))
    return {key: value for key, value in state_dict.items() if not key.startswith((layer, *learnt))}


def from_google(arrays: StateDict) -> StateDict:
    """Convert the arrays of a JAX R+ViT checkpoint (github:google-research/vision_transformer).

    Kernels are (height, width, in, out) or (in, out); attention is (width, heads, width / heads).
    """
    for prefix in ('opt/target/', 'params/'):
        if any(key.startswith(prefix) for key in arrays):  # the optimizer's arrays stand beside the model's
            arrays = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    backbone = 'patch_embed.backbone.'
    stem = backbone + ('stem.' if any(key.startswith('block') for key in arrays) else '')
    encoder = r'Transformer/encoderblock_(\d+)/'
    attention, mlp = r'MultiHeadDotProductAttention_\d/', r'MlpBlock_\d/'
    result: StateDict = {}
    arrays = _without_pre_logits(arrays, 'pre_logits/', 'head/')
    for key, value in arrays.items():
        new = _renamed(
            key.replace('/kernel', '.weight').replace('/scale', '.weight').replace('/bias', '.bias'),
            (r'^conv_root', stem + 'conv'),
            (r'^gn_root', stem + 'norm'),
            (r'^block(\d+)/unit(\d+)/', lambda m: f'{backbone}stages.{int(m[1]) - 1}.blocks.{int(m[2]) - 1}.'),
            (r'\bgn(\d)', r'norm\1'),
            (r'\bconv_proj', 'downsample.conv'),
            (r'\bgn_proj', 'downsample.norm'),
            (r'^embedding', 'patch_embed.proj'),
            (r'^cls$', 'cls_token'),
            (r'^Transformer/posembed_input/pos_embedding$', 'pos_embed'),
            (r'^Transformer/encoder_norm', 'norm'),
            (encoder, r'blocks.\1.'),
            (r'LayerNorm_0', 'norm1'),
            (r'LayerNorm_[12]', 'norm2'),
            (mlp + r'Dense_(\d)', lambda m: f'mlp.fc{int(m[1]) + 1}'),
            (attention + 'out', 'attn.proj'),
            (attention, 'attn.'),
        )
        if key.endswith('/kernel'):
            if '/out/' in key:
                value = value.flatten(0, 1)
            elif 'MultiHead' in key:
                value = value.flatten(1)
            value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
        elif re.search(r'/(bias|scale)$', key):
            value = value.flatten()
        result[new] = value.contiguous()
    head = [key for key in result if key.startswith('head.')]
    if head and not any(result[key].any() for key in head):  # so are those of the first ViT paper before fine-tuning
        _logger.warning('Google JAX: the head is all zeros, and is left out: %s.', ', '.join(sorted(head)))
        result = {key: value for key, value in result.items() if key not in head}
    return _join_qkv(result)


def from_vit_hybrid(state_dict: StateDict) -> StateDict:
    """Convert transformers' ViTHybridForImageClassification, or its ViTHybridModel (gone since transformers 5)."""
    result: StateDict = {}
    for key, value in state_dict.items():
        new = _renamed(
            key.removeprefix('vit.'),
            (r'^embeddings\.cls_token', 'cls_token'),
            (r'^embeddings\.position_embeddings', 'pos_embed'),
            (r'^embeddings\.patch_embeddings\.projection', 'patch_embed.proj'),
            (r'^embeddings\.patch_embeddings\.backbone\.bit\.', 'patch_embed.backbone.'),
            (r'\bembedder\.convolution', 'stem.conv'),
            (r'\bembedder\.norm', 'stem.norm'),
            (r'\bencoder\.stages\.(\d+)\.layers\.', r'stages.\1.blocks.'),
            (r'^encoder\.layer\.', 'blocks.'),
            (r'attention\.attention\.', 'attn.'),
            (r'attention\.output\.dense', 'attn.proj'),
            (r'intermediate\.dense', 'mlp.fc1'),
            (r'(?<=\d\.)output\.dense', 'mlp.fc2'),
            (r'layernorm_before', 'norm1'),
            (r'layernorm_after', 'norm2'),
            (r'^layernorm', 'norm'),
            (r'^classifier', 'head'),
        )
        if not new.startswith('pooler.'):  # ViTHybridModel has a pooler, which its classifier does not use
            result[new] = value
    return _join_qkv(result)


def from_dpt_hybrid(state_dict: StateDict) -> StateDict:
    """Convert the backbone of transformers' DPT models with `is_hybrid`, which is ViTHybrid's but for two names."""
    rules = (r'^dpt\.', ''), (r'^embeddings\.(?=(backbone|projection)\.)', 'embeddings.patch_embeddings.')
    return from_vit_hybrid({_renamed(key, *rules): value for key, value in state_dict.items()})


def from_midas(state_dict: StateDict) -> StateDict:
    """Convert the backbone of a DPT by its authors (github:isl-org/MiDaS, github:isl-org/DPT): a model of timm's."""
    return {key.removeprefix('pretrained.model.'): value for key, value in state_dict.items()}


def from_pix2tex(state_dict: StateDict) -> StateDict:
    """Convert the encoder of a pix2tex model with a ResNet (github:lukas-blecher/LaTeX-OCR): a model of timm's."""
    return {key.removeprefix('encoder.'): value for key, value in state_dict.items()}


def from_conformer(state_dict: StateDict) -> StateDict:
    """Convert a Conformer of its authors (github:pengzhiliang/Conformer), or of mmpretrain (keys below `backbone.`).

    The projections between ResNet and ViT are 1x1 convolutions there, and linear layers here.
    """
    return {
        _renamed(
            key,
            (r'^backbone\.', ''),
            (r'^head\.', ''),
            (r'^conv_cls_head\.', 'head_resnet.'),
            (r'^trans_cls_head\.', 'head_vit.'),
            (r'^trans_norm\.', 'norm.'),
            (r'^(conv1|bn1)\.', r'stem.\1.'),
            (r'^conv_1\.', 'units.0.conv_block.'),
            (r'^trans_patch_conv\.', 'units.0.patch_embed.'),
            (r'^trans_1\.', 'units.0.block.'),
            (r'^conv_trans_(\d+)\.', lambda m: f'units.{int(m[1]) - 1}.'),
            (r'\bcnn_block\.', 'conv_block.'),
            (r'\btrans_block\.', 'block.'),
            (r'\bsqueeze_block\.conv_project\.', 'down.proj.'),
            (r'\bsqueeze_block\.ln\.', 'down.norm.'),
            (r'\bexpand_block\.conv_project\.', 'up.proj.'),
            (r'\bexpand_block\.bn\.', 'up.norm.'),
            (r'\bresidual_conv\.', 'downsample.0.'),
            (r'\bresidual_bn\.', 'downsample.1.'),
            (r'\bln([12])\.', r'norm\1.'),
            (r'\bffn\.layers\.0\.0\.', 'mlp.fc1.'),
            (r'\bffn\.layers\.1\.', 'mlp.fc2.'),
        ): value.flatten(1) if key.endswith('.conv_project.weight') else value
        for key, value in state_dict.items()
    }


def _renamed(key: str, *rules: Tuple[str, Any]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _join_qkv(state_dict: StateDict) -> StateDict:
    """Join query, key and value; where one is missing, the others keep their names, and the comparison lists them."""
    result: StateDict = {}
    for key, value in state_dict.items():
        part = re.fullmatch(r'(.*\.attn\.)(query|key|value)(\..*)', key)
        names = [f'{part[1]}{name}{part[3]}' for name in ('query', 'key', 'value')] if part else []
        if not part or not all(name in state_dict for name in names):
            result[key] = value
        elif part[2] == 'query':
            result[f'{part[1]}qkv{part[3]}'] = torch.cat([state_dict[name] for name in names])
    return result


TIMM = Layout('timm', r'^$', from_timm, license=None)  # anybody's
LAYOUTS: List[Layout] = [
    Layout('Google JAX', r'(^|/)(conv_root|embedding)/kernel$', from_google),
    Layout(
        'transformers ViTHybrid',
        r'^(vit\.)?embeddings\.patch_embeddings\.',
        from_vit_hybrid,
        model_type='vit-hybrid',
    ),
    Layout(
        'transformers DPT-Hybrid',
        r'^(dpt\.)?embeddings\.backbone\.bit\.',
        from_dpt_hybrid,
        left_out=r'(neck|head|auxiliary_head|pooler)\b',
        model_type='dpt',
    ),
    Layout(
        'MiDaS DPT',
        r'^pretrained\.model\.',
        from_midas,
        # its classifier is ImageNet's as it was before the rest was trained further, and nothing there uses it
        left_out=r'(scratch|auxlayer|pretrained\.act_postprocess\d|pretrained\.model\.head)\b',
        published=r'dpt_hybrid(-midas-501f0c75|-ade20k-53898607|_384|_kitti-cb926ef4|_nyu-2ce69ec7)\.pt',
        license='mit',
    ),
    Layout(
        'pix2tex',
        r'^encoder\.patch_embed\.backbone\.',
        from_pix2tex,
        left_out=r'decoder\b',  # what writes the formula
        published=r'weights\.pth',
        license='mit',
    ),
    Layout(
        'Conformer',
        r'^trans_patch_conv\.',
        from_conformer,
        published=r'Conformer_(tiny|small|base)_patch(16|32)\.pth',
    ),
    Layout(
        'mmpretrain Conformer',
        r'^backbone\.trans_patch_conv\.',
        from_conformer,
        published=r'conformer-(tiny|small|base)-p(16|32)_(3rdparty_)?8xb128_in1k_\d{8}-[0-9a-f]{8}\.pth',
    ),
]
