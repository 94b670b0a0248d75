"""Write a random-weight checkpoint of transformers' ViTHybridForImageClassification, and its logits, to test against.

The class left transformers in 5.0, so this is not of the test suite's environment but runs in one of its own, which
`make test-vithybrid` makes (transformers 4.40.2, tokenizers 0.19.1, huggingface_hub 0.36.2, torch 2.14.1):

    python tests/vithybrid_reference.py OUTPUT_FOLDER [--seed 0]

The model is google/vit-hybrid-base-bit-384 in its measures (R50+ViT-B/16 at 384, 1000 classes). OUTPUT_FOLDER gets
config.json, model.safetensors, pytorch_model.bin (the same weights as a pickle), preprocessor_config.json, and
reference.safetensors: `input` (1, 3, 384, 384) and the model's `logits` (1, 1000) of it. One thread, so that a seed
gives the same numbers again on the same machine.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # before transformers is imported: nothing here comes from the Hub

import torch
from safetensors.torch import save_file
from transformers import BitConfig, ViTHybridConfig, ViTHybridForImageClassification, ViTHybridImageProcessor

NUM_CLASSES = 1000
IMAGE_SIZE = 384


def build_config() -> ViTHybridConfig:
    """Return the measures of google/vit-hybrid-base-bit-384; what is left out is the class's default."""
    backbone_config = BitConfig(
        global_padding='same',
        layer_type='bottleneck',
        depths=(3, 4, 9),
        out_features=['stage3'],
        embedding_dynamic_padding=True,
    )
    return ViTHybridConfig(
        backbone_config=backbone_config,
        image_size=IMAGE_SIZE,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        id2label={i: f'class {i}' for i in range(NUM_CLASSES)},
        label2id={f'class {i}': i for i in range(NUM_CLASSES)},
    )


def build_model(seed: int) -> ViTHybridForImageClassification:
    """Return a model in evaluation mode; no two of its parameters are equal by accident, as biases of 0 would be."""
    torch.manual_seed(seed)
    model = ViTHybridForImageClassification(build_config()).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def build_processor() -> ViTHybridImageProcessor:
    return ViTHybridImageProcessor(
        size={'shortest_edge': IMAGE_SIZE},
        resample=3,  # bicubic
        crop_size={'height': IMAGE_SIZE, 'width': IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('output_folder', type=Path)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)

    model = build_model(args.seed)
    model.save_pretrained(args.output_folder, safe_serialization=True)
    torch.save(model.state_dict(), args.output_folder / 'pytorch_model.bin')
    build_processor().save_pretrained(args.output_folder)

    images = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(args.seed + 1))
    with torch.inference_mode():
        logits = model(images).logits
    tensors = {'input': images, 'logits': logits.clone()}
    save_file(tensors, str(args.output_folder / 'reference.safetensors'))
    print(f'{args.output_folder}: {len(model.state_dict())} tensors, logits of standard deviation {logits.std():.4f}')


if __name__ == '__main__':
    main()
