"""Weights of timm's hybrids as others name and shape them, for files to test against."""

import json
import re

import safetensors.torch
import torch


def google_layout(model, prefix=''):
    """Return a model's weights as Google's JAX files name and shape them: timm's `_load_weights` read backwards."""
    arrays = {}

    def put(name, tensor, kernel=False):
        array = tensor.detach().numpy()
        if kernel:
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        arrays[prefix + name] = array

    def put_conv(name, norm_name, conv, norm):
        put(f'{name}/kernel', conv.weight, kernel=True)
        for theirs, tensor in (('scale', norm.weight), ('bias', norm.bias)):
            put(f'{norm_name}/{theirs}', tensor.reshape(1, 1, 1, -1))

    backbone = model.patch_embed.backbone
    stem = getattr(backbone, 'stem', backbone)
    put_conv('conv_root', 'gn_root', stem.conv, stem.norm)
    for i, stage in enumerate(getattr(backbone, 'stages', [])):
        for j, block in enumerate(stage.blocks):
            unit = f'block{i + 1}/unit{j + 1}'
            for r in (1, 2, 3):
                put_conv(f'{unit}/conv{r}', f'{unit}/gn{r}', getattr(block, f'conv{r}'), getattr(block, f'norm{r}'))
            if block.downsample is not None:
                put_conv(f'{unit}/conv_proj', f'{unit}/gn_proj', block.downsample.conv, block.downsample.norm)

    def put_linear(name, linear):
        put(f'{name}/kernel', linear.weight, kernel=True)
        put(f'{name}/bias', linear.bias)

    def put_norm(name, norm):
        put(f'{name}/scale', norm.weight)
        put(f'{name}/bias', norm.bias)

    put_linear('embedding', model.patch_embed.proj)
    put('cls', model.cls_token)
    put('Transformer/posembed_input/pos_embedding', model.pos_embed)
    put_norm('Transformer/encoder_norm', model.norm)
    if isinstance(model.head, torch.nn.Linear):
        put_linear('head', model.head)
    width = model.embed_dim
    if isinstance(model.head, torch.nn.Linear) and not model.head.weight.any():
        put_linear('pre_logits', torch.nn.Linear(width, width))  # as files have whose head did not learn yet
    for i, block in enumerate(model.blocks):
        name = f'Transformer/encoderblock_{i}'
        put_norm(f'{name}/LayerNorm_0', block.norm1)
        put_norm(f'{name}/LayerNorm_2', block.norm2)
        put_linear(f'{name}/MlpBlock_3/Dense_0', block.mlp.fc1)
        put_linear(f'{name}/MlpBlock_3/Dense_1', block.mlp.fc2)
        attention, heads = f'{name}/MultiHeadDotProductAttention_1', block.attn.num_heads
        parts = zip(('query', 'key', 'value'), block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3))
        for part, weight, bias in parts:
            put(f'{attention}/{part}/kernel', weight.T.reshape(width, heads, -1))
            put(f'{attention}/{part}/bias', bias.reshape(heads, -1))
        put(f'{attention}/out/kernel', block.attn.proj.weight.T.reshape(heads, width // heads, width))
        put(f'{attention}/out/bias', block.attn.proj.bias)
    return arrays


def hybrid_layout(model):
    """Return a model's weights as transformers' ViTHybridForImageClassification names them."""
    result = {}
    for key, value in model.state_dict().items():
        for ours, theirs in (
            ('patch_embed.backbone.stages.', 'vit.embeddings.patch_embeddings.backbone.bit.encoder.stages.'),
            ('patch_embed.backbone.stem.', 'vit.embeddings.patch_embeddings.backbone.bit.embedder.'),
            ('embedder.conv', 'embedder.convolution'),
            ('.blocks.', '.layers.'),
            ('patch_embed.proj', 'vit.embeddings.patch_embeddings.projection'),
            ('cls_token', 'vit.embeddings.cls_token'),
            ('pos_embed', 'vit.embeddings.position_embeddings'),
        ):
            key = key.replace(ours, theirs)
        if key.startswith('blocks.'):
            key = 'vit.encoder.layer.' + key.removeprefix('blocks.')
            key = key.replace('attn.proj', 'attention.output.dense').replace('mlp.fc1', 'intermediate.dense')
            key = key.replace('mlp.fc2', 'output.dense').replace('norm1', 'layernorm_before')
            key = key.replace('norm2', 'layernorm_after')
        if 'attn.qkv' in key:
            for part, chunk in zip(('query', 'key', 'value'), value.chunk(3)):
                result[key.replace('attn.qkv', f'attention.attention.{part}')] = chunk.clone()
            continue
        if key.startswith('norm.'):
            key = 'vit.layer' + key
        result[key.replace('head.', 'classifier.')] = value
    return result


def dpt_layout(model):
    """Return a model's weights as the backbone of transformers' DPTForDepthEstimation, with a bit of a decoder."""
    result = {'neck.convs.0.weight': torch.ones(2, 2, 3, 3), 'head.head.0.weight': torch.ones(1, 2, 3, 3)}
    for key, value in hybrid_layout(model).items():
        if not key.startswith('classifier.'):
            key = key.replace('embeddings.patch_embeddings.', 'embeddings.')
            result['dpt.' + key.removeprefix('vit.')] = value
    return result


def midas_layout(model):
    """Return a model's weights as the backbone of MiDaS's DPT, with a bit of a decoder and ImageNet's classifier."""
    result = {'pretrained.model.' + key: value for key, value in model.state_dict().items()}
    result['pretrained.model.head.weight'] = torch.ones(1000, model.num_features)
    result['pretrained.act_postprocess3.3.bias'] = result['scratch.output_conv.0.bias'] = torch.ones(2)
    return result


def pix2tex_layout(model):
    """Return a model's weights as the encoder of a pix2tex model, with a bit of its decoder."""
    result = {'encoder.' + key: value for key, value in model.state_dict().items() if not key.startswith('head.')}
    result['decoder.net.token_emb.weight'] = result['decoder.net.to_logits.bias'] = torch.ones(2)
    return result


def conformer_layout(state_dict):
    """Return a parallel hybrid's weights as Conformer's authors name them."""
    rules = (
        (r'^head_resnet\.', 'conv_cls_head.'),
        (r'^head_vit\.', 'trans_cls_head.'),
        (r'^norm\.', 'trans_norm.'),
        (r'^stem\.', ''),
        (r'^units\.0\.conv_block\.', 'conv_1.'),
        (r'^units\.0\.patch_embed\.', 'trans_patch_conv.'),
        (r'^units\.0\.block\.', 'trans_1.'),
        (r'^units\.(\d+)\.', lambda match: f'conv_trans_{int(match[1]) + 1}.'),
        (r'\.conv_block\.', '.cnn_block.'),
        (r'\.block\.', '.trans_block.'),
        (r'\.down\.proj\.', '.squeeze_block.conv_project.'),
        (r'\.down\.norm\.', '.squeeze_block.ln.'),
        (r'\.up\.proj\.', '.expand_block.conv_project.'),
        (r'\.up\.norm\.', '.expand_block.bn.'),
        (r'\.downsample\.0\.', '.residual_conv.'),
        (r'\.downsample\.1\.', '.residual_bn.'),
    )
    result = {}
    for key, value in state_dict.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        result[key] = value[:, :, None, None] if key.endswith('.conv_project.weight') else value
    return result


def mmpretrain_layout(state_dict):
    """Return a parallel hybrid's weights as mmpretrain names them."""
    result = {}
    for key, value in conformer_layout(state_dict).items():
        if re.match(r'trans_1|conv_trans_\d+\.trans_block', key):
            key = re.sub(r'\.norm([12])\.', r'.ln\1.', key)
            key = key.replace('.mlp.fc1.', '.ffn.layers.0.0.').replace('.mlp.fc2.', '.ffn.layers.1.')
        result[('head.' if 'cls_head' in key else 'backbone.') + key] = value
    return result


def _google(model):
    return {name: torch.from_numpy(array.copy()) for name, array in google_layout(model).items()}


# What writes a hybrid of an architecture in each of `LAYOUTS`
EXAMPLES = {
    'Google JAX': ('test_vitresnet', _google),
    'transformers ViTHybrid': ('test_vitresnet', hybrid_layout),
    'transformers DPT-Hybrid': ('test_vitresnet', dpt_layout),
    'MiDaS DPT': ('test_vitresnet', midas_layout),
    'pix2tex': ('test_vitresnet', pix2tex_layout),
    'Conformer': ('test_vitresnet_dual', lambda model: conformer_layout(model.state_dict())),
    'mmpretrain Conformer': ('test_vitresnet_dual', lambda model: mmpretrain_layout(model.state_dict())),
}

# Layouts of models with a decoder in place of a classifier, and what is said of the tensors that are left out
WITHOUT_HEAD = {
    'transformers DPT-Hybrid': '2 tensors of other parts are left out: head (1), neck (1).',
    'pix2tex': '2 tensors of other parts are left out: decoder (2).',
    'MiDaS DPT': '4 tensors of other parts are left out: pretrained.act_postprocess3 (1), pretrained.model.head (2), '
    'scratch (1).',
}


def write_shards(model, folder, suffix='safetensors'):
    """Write a model as Hugging Face's libraries write large ones; return the index."""
    folder.mkdir(exist_ok=True)
    weights, index = dict(model.state_dict()), {}
    for number in range(3):
        name = f'model-{number + 1:05}-of-00003.{suffix}'
        part = {key: weights[key].clone() for key in list(weights)[number::3]}
        torch.save(part, folder / name) if suffix == 'bin' else safetensors.torch.save_file(part, folder / name)
        index.update(dict.fromkeys(part, name))
    path = folder / ('pytorch_model.bin.index.json' if suffix == 'bin' else 'model.safetensors.index.json')
    path.write_text(json.dumps(dict(metadata=dict(total_size=1), weight_map=index)))
    return path
