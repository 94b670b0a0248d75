"""Maps of a serial hybrid: the ResNet's levels, then the ViT's tokens laid out as maps.

image -> plan (what the maps need) -> run -> collect (the maps in the order and form wanted). A pyramid ends with the
tokens of the last block; where the patches leap over strides, tokens of earlier blocks are enlarged to fill them in.
"""

from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import torch
from timm.models import checkpoint
from torch import nn

from .layers import feature_take_indices, keep_mode_, unflatten_tokens


def check_output_fmt(output_fmt: str) -> None:
    """Raise ValueError unless maps (NCHW) or tokens (NLC) are asked for."""
    if output_fmt not in ('NCHW', 'NLC'):
        raise ValueError(f"output_fmt: got '{output_fmt}', expected 'NCHW' or 'NLC'.")


def as_format(x: torch.Tensor, output_fmt: str) -> torch.Tensor:
    """Return a map (B, C, H, W) as it is, or as tokens (B, H * W, C)."""
    return x.flatten(2).transpose(1, 2) if output_fmt == 'NLC' else x


class Plan(NamedTuple):
    """What has to be computed for some maps."""

    maps: List[int]  # indices of `feature_info`, in the order wanted
    num_levels: int  # how many levels of the ResNet are computed
    past_resnet: bool  # whether tokens are made of its map
    last_block: int  # the last block of the ViT that runs; -1 for none
    kept_blocks: List[int]  # blocks whose tokens are kept


class Computed(NamedTuple):
    """What was computed."""

    x: torch.Tensor  # what the last part returned: tokens (B, N, D)
    levels: List[torch.Tensor]  # maps of the ResNet: (B, C, h, w)
    tokens: Dict[int, torch.Tensor]  # by block: (B, P + H' * W', D)
    grid: Tuple[int, int]  # how the tokens lie: (H', W')


class SerialFeatures(nn.Module):
    """The methods of a serial hybrid by which timm takes its maps; a base class beside timm's `VisionTransformer`.

    Attributes:
        level_indices: For the first entries of `feature_info`: which level of the ResNet each one is.
        block_indices: For all further entries: the block whose tokens each one is.
        enlargements: For the same entries: the factor by which the map of tokens is enlarged.
    """

    # TorchScript can't tell what an empty list holds
    level_indices: List[int]
    block_indices: List[int]
    enlargements: List[int]

    def _init_feature_info(self) -> None:
        """List the maps: those of the pyramid, which the last block ends, then the tokens of every block but the first.

        So the first entries are the pyramid, the last one is the last block, as in a ViT, and -k is the k-th block
        from the end, up to depth - 1. The first block is left out for programs that take entries at even distances: the
        four that segmentation_models' DPT takes are then a map of the pyramid and, of 12 blocks, the fourth, eighth and
        last.
        """
        embed, depth = self.patch_embed, len(self.blocks)
        levels = list(embed.backbone.feature_info)
        between: List[Tuple[int, int]] = []
        if depth and levels and embed.patch_size == (1, 1):
            levels = levels[:-1]  # the tokens take the place of the map that they are made of
        elif depth and levels:
            between = _blocks_between(depth, embed.patch_size)
        sources = [*between, (depth - 1, 1), *((block, 1) for block in range(1, depth))] if depth else []
        self.block_indices = [block for block, _ in sources]
        self.enlargements = [factor for _, factor in sources]
        num_pyramid = len(levels) + (len(between) + 1 if depth else 0)

        info = [dict(level, module='patch_embed.backbone.' + level['module']) for level in levels]
        stride = embed.feat_ratio()
        modules = set()
        for block, factor in sources:
            module = dict(module=f'blocks.{block}')
            # no two entries may have one name (transformers)
            if block in modules and block == depth - 1:
                module = dict(module='blocks')  # what the last block returns is what all of them return
            elif block in modules:  # and what another one returns is what the next one takes
                module = dict(module=f'blocks.{block + 1}.norm1', hook_type='forward_pre')
            modules.add(block)
            info.append(dict(module, num_chs=self.embed_dim, reduction=stride // factor))
        # a stem that leaves its strides to the stages has the reduction of the first of them
        first = int(num_pyramid > 1 and info[0]['reduction'] == info[1]['reduction'])
        self.feature_info = info[first:]
        self.num_pyramid = num_pyramid - first
        self.level_indices = list(range(first, len(levels)))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Optional[torch.Tensor] = None,
        is_causal: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]], Dict[str, Any]]:
        """Return the features, and the maps that `feature_info` lists.

        Args:
            x: (B, C, H, W).
            indices: Of `feature_info`, in the order wanted: None for all, a number for the last so many.
            return_prefix_tokens: Return (map, prefix tokens (B, P, D)) in place of each map. The ResNet has none: its
                map's mean over the image, P times, stands in for them, the whole image in one vector like a class
                token. Without prefix tokens in the ViT (P = 0) maps alone are returned, as by timm's ViTs.
            norm: Apply the final norm to the maps that are tokens.
            stop_early: Leave out what no map needs; the features are then those of the last part that ran.
            output_fmt: 'NCHW': maps (B, C, H / reduction, W / reduction); 'NLC': tokens (B, N, C).
            intermediates_only: Return the maps alone.
            output_dict: Return {'image_intermediates', 'image_intermediates_prefix', 'image_features'}.
            attn_mask, is_causal: As in `forward`.

        Returns:
            (features (B, N, D), maps), or as the arguments say.
        """
        check_output_fmt(output_fmt)
        plan = self._plan(indices, stop_early)
        size = (x.shape[-2], x.shape[-1])
        computed = self._run(x, plan, norm, attn_mask, is_causal)
        with_prefixes = return_prefix_tokens and self.num_prefix_tokens > 0
        maps, prefixes = self._collect(plan, computed, size, output_fmt, with_prefixes)
        if not torch.jit.is_scripting():  # a script can return neither a dict of these nor pairs
            if output_dict:
                result: Dict[str, Any] = {'image_intermediates': maps}
                if with_prefixes:
                    result['image_intermediates_prefix'] = prefixes
                if not intermediates_only:
                    result['image_features'] = self._normalised(computed, plan)
                return result
            if with_prefixes:
                pairs: Any = list(zip(maps, prefixes))
                return pairs if intermediates_only else (self._normalised(computed, plan), pairs)
        if intermediates_only:
            return maps
        return self._normalised(computed, plan), maps

    def _normalised(self, computed: Computed, plan: Plan) -> torch.Tensor:
        """Return what the last part returned, behind the final norm if that part is the ViT."""
        return self.norm(computed.x) if plan.past_resnet else computed.x

    def _plan(self, indices: Optional[Union[int, List[int]]], stop_early: bool) -> Plan:
        """Return what the maps at `indices` need; all there is without `stop_early`."""
        num_levels = len(self.level_indices)
        maps = self._take(indices)
        last_level, last_block = -1, -1
        kept: List[int] = []
        for i in maps:
            if i < num_levels:
                last_level = max(last_level, self.level_indices[i])
            else:
                kept.append(self.block_indices[i - num_levels])
                last_block = max(last_block, kept[-1])
        past_resnet = not stop_early or last_block >= 0
        return Plan(
            maps,
            self.patch_embed.num_levels if past_resnet else last_level + 1,
            past_resnet,
            last_block if stop_early else len(self.blocks) - 1,
            kept,
        )

    def _take(self, indices: Optional[Union[int, List[int]]]) -> List[int]:
        """Return which maps are meant; of a pruned model all, and the last so many, are of those that are left."""
        maps, _ = feature_take_indices(len(self.level_indices) + len(self.block_indices), indices)
        return maps if torch.jit.is_scripting() else self._take_left(maps, indices)  # a script has its maps by number

    @torch.jit.unused
    def _take_left(self, maps: List[int], indices: Optional[Union[int, List[int]]]) -> List[int]:
        left = [i for i, level in enumerate(self.level_indices) if level < self.patch_embed.num_levels]
        blocks = enumerate(self.block_indices, len(self.level_indices))
        left += [i for i, block in blocks if block < len(self.blocks)]
        if indices is None or isinstance(indices, int):
            return [left[place] for place in feature_take_indices(len(left), indices)[0]]
        for i in maps:
            if i not in left:
                raise ValueError(f'indices: got {i}, but the model was pruned, and has {left} left.')
        return maps

    def _run(
        self, x: torch.Tensor, plan: Plan, norm: bool, attn_mask: Optional[torch.Tensor], is_causal: bool
    ) -> Computed:
        """Compute what a plan says. x: (B, C, H, W)."""
        tokens: Dict[int, torch.Tensor] = {}
        levels = self.patch_embed.forward_levels(x, plan.num_levels)
        if len(levels) > 0:
            x = levels[-1]
        if not plan.past_resnet:
            return Computed(x.flatten(2).transpose(1, 2), levels, tokens, (0, 0))
        x = self.patch_embed.patchify(x)
        grid = (x.shape[1], x.shape[2])
        x = self._pos_embed(x)
        x = self.norm_pre(self.patch_drop(x))
        for i, block in enumerate(self.blocks):
            if i <= plan.last_block:
                if attn_mask is not None or is_causal:
                    x = block(x, attn_mask=attn_mask, is_causal=is_causal)
                elif self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint(block, x)
                else:
                    x = block(x)
                if i in plan.kept_blocks:
                    tokens[i] = self.norm(x) if norm else x
        return Computed(x, levels, tokens, grid)

    def _collect(
        self, plan: Plan, computed: Computed, size: Tuple[int, int], output_fmt: str, with_prefixes: bool
    ) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
        """Return the maps of a plan for an image of height and width `size`, and the prefix tokens of each if wanted.

        The latter are (B, P, C).
        """
        maps: List[torch.Tensor] = []
        prefixes: List[torch.Tensor] = []
        for i in plan.maps:
            j = i - len(self.level_indices)
            if j < 0:
                level = computed.levels[self.level_indices[i]]
                if with_prefixes:
                    prefixes.append(level.mean((2, 3)).unsqueeze(1).expand(-1, self.num_prefix_tokens, -1))
                maps.append(as_format(level, output_fmt))
                continue
            tokens, factor = computed.tokens[self.block_indices[j]], self.enlargements[j]
            if with_prefixes:
                prefixes.append(tokens[:, : self.num_prefix_tokens])
            patches = tokens[:, self.num_prefix_tokens :]
            if output_fmt == 'NLC' and factor == 1:
                maps.append(patches)
            else:
                y = self.patch_embed.enlarge(unflatten_tokens(patches, computed.grid), size, factor)
                y = y.contiguous()  # and the caller's own: the next block still needs its tokens
                maps.append(as_format(y, output_fmt))
        return maps, prefixes

    def get_intermediate_layers(
        self,
        x: torch.Tensor,
        n: Union[int, List[int], Tuple[int, ...]] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Optional[torch.Tensor] = None,
    ) -> List[torch.Tensor]:
        """Return the tokens after blocks, in their order (DINO's interface): the last `n`, or those numbered in `n`."""
        blocks, last_block = feature_take_indices(len(self.blocks), n if isinstance(n, int) else list(n))
        plan = Plan([], self.patch_embed.num_levels, True, last_block, blocks)
        computed = self._run(x, plan, norm, attn_mask, is_causal=False)
        layers: List[Any] = []
        for block in sorted(set(blocks)):
            prefix, patches = computed.tokens[block].tensor_split([self.num_prefix_tokens], dim=1)
            layer = unflatten_tokens(patches, computed.grid).contiguous() if reshape else patches
            layers.append((layer, prefix) if return_prefix_tokens and self.num_prefix_tokens > 0 else layer)
        return layers

    def prune_intermediate_layers(
        self,
        indices: Union[int, List[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> List[int]:
        """Remove what the maps at `indices` of `feature_info` do not need; what the head needs stays with the head.

        Without a block the model becomes its ResNet up to the deepest level asked for, as with depth=0.

        Returns:
            The indices, counted from 0.
        """
        plan = self._plan(indices, stop_early=True)
        if prune_head:
            if plan.past_resnet:
                self.blocks = self.blocks[: plan.last_block + 1]
            else:
                self._prune_to_resnet(plan.num_levels - 1)
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, '')
        keep_mode_(self)
        return plan.maps

    def _prune_to_resnet(self, level: int) -> None:
        """Become the ResNet alone, up to a level."""
        if self.cfg.stage == 0 and level == 0:
            self._change_cfg(stem_stride=min(self.cfg.stem_stride or 4, 2))  # a stem without its pooling
        self.patch_embed.prune(level)
        self.cls_token = self.reg_token = self.pos_embed = None
        self.num_prefix_tokens = self.num_reg_tokens = 0
        self.has_class_token = False
        for name in ('patch_drop', 'norm_pre', 'norm'):
            setattr(self, name, nn.Identity())
        self.blocks = nn.Sequential()
        self.num_features = self.head_hidden_size = self.embed_dim = self.patch_embed.feature_dim


def _blocks_between(depth: int, patch_size: Tuple[int, int]) -> List[Tuple[int, int]]:
    """Return blocks, at even distances, for the strides that a patch leaps over, and how much to enlarge their maps."""
    side = patch_size[0]
    missing = side.bit_length() - 2
    if patch_size[1] != side or side != 2 ** (missing + 1) or missing >= depth:
        return []
    return [(round(depth * i / (missing + 1)) - 1, 2 ** (missing + 1 - i)) for i in range(1, missing + 1)]
