"""The stage against a literal re-implementation of mmsegmentation's ``KernelUpdateHead``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knet_train.models.knet import KernelAttention, KernelUpdateStage


class MmsegUpdator(nn.Module):
    """``KernelUpdator`` of mmseg/models/decode_heads/knet_head.py (gate_sigmoid, norm_out)."""

    def __init__(self, in_channels: int, feat_channels: int) -> None:
        super().__init__()
        self.in_channels, self.feat = in_channels, feat_channels
        self.dynamic_layer = nn.Linear(feat_channels, 2 * feat_channels)
        self.input_layer = nn.Linear(feat_channels, 2 * feat_channels)
        self.input_gate = nn.Linear(feat_channels, feat_channels)
        self.update_gate = nn.Linear(feat_channels, feat_channels)
        self.norm_in = nn.LayerNorm(feat_channels)
        self.norm_out = nn.LayerNorm(feat_channels)
        self.input_norm_in = nn.LayerNorm(feat_channels)
        self.input_norm_out = nn.LayerNorm(feat_channels)
        self.fc_layer = nn.Linear(feat_channels, feat_channels)
        self.fc_norm = nn.LayerNorm(feat_channels)

    def forward(self, update_feature: Tensor, input_feature: Tensor) -> Tensor:
        update_feature = update_feature.reshape(-1, self.feat)
        num_proposals = update_feature.size(0)
        parameters = self.dynamic_layer(update_feature)
        param_in = parameters[:, : self.feat].view(-1, self.feat)
        param_out = parameters[:, -self.feat :].view(-1, self.feat)
        input_feats = self.input_layer(input_feature.reshape(num_proposals, -1, self.feat))
        input_in = input_feats[..., : self.feat]
        input_out = input_feats[..., -self.feat :]
        gate_feats = input_in * param_in.unsqueeze(-2)
        input_gate = self.input_norm_in(self.input_gate(gate_feats)).sigmoid()
        update_gate = self.norm_in(self.update_gate(gate_feats)).sigmoid()
        param_out = self.norm_out(param_out)
        input_out = self.input_norm_out(input_out)
        features = update_gate * param_out.unsqueeze(-2) + input_gate * input_out
        return F.relu(self.fc_norm(self.fc_layer(features)))


class MmsegStage(nn.Module):
    """``KernelUpdateHead.forward``: einsum, sequence-first attention, a convolution per image."""

    def __init__(self, channels: int, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.channels, self.width = channels, width
        self.feat_transform = nn.Conv2d(channels, channels, 1)
        self.kernel_update_conv = MmsegUpdator(channels, width)
        self.attention = nn.MultiheadAttention(channels, heads)
        self.attention_norm = nn.LayerNorm(channels)
        self.ffn1, self.ffn2 = nn.Linear(channels, ffn), nn.Linear(ffn, channels)
        self.ffn_norm = nn.LayerNorm(channels)
        self.mask_fc, self.mask_norm = (
            nn.Linear(channels, channels, bias=False),
            nn.LayerNorm(channels),
        )
        self.fc_mask = nn.Linear(channels, channels)

    def forward(self, x: Tensor, kernels: Tensor, mask_preds: Tensor) -> tuple[Tensor, Tensor]:
        batch, count = kernels.shape[:2]
        x = self.feat_transform(x)
        masks = mask_preds.softmax(dim=1)
        x_feat = torch.einsum("bnhw,bchw->bnc", masks, x)
        # [B, N, C, 1, 1] -> [B, N, 1 (K×K), C], as for conv_kernel_size = 1
        proposal = kernels[..., None, None].reshape(batch, count, self.channels, -1)
        proposal = proposal.permute(0, 1, 3, 2)
        obj = self.kernel_update_conv(x_feat, proposal)
        obj = obj.reshape(batch, count, -1).permute(1, 0, 2)
        obj = self.attention_norm(obj + self.attention(obj, obj, obj, need_weights=False)[0])
        obj = obj.permute(1, 0, 2).reshape(batch, count, -1, self.channels)
        obj = self.ffn_norm(obj + self.ffn2(F.relu(self.ffn1(obj))))
        mask_feat = self.fc_mask(F.relu(self.mask_norm(self.mask_fc(obj)))).permute(0, 1, 3, 2)
        mask_feat = mask_feat.reshape(batch, count, self.channels, 1, 1)
        out = [F.conv2d(x[i : i + 1], mask_feat[i]) for i in range(batch)]
        return obj.reshape(batch, count, self.channels), torch.cat(out)


def pair(channels: int, width: int, heads: int, ffn: int) -> tuple[KernelUpdateStage, MmsegStage]:
    ours = KernelUpdateStage(channels, width, heads, ffn)
    reference = MmsegStage(channels, width, heads, ffn)
    for parameter in ours.parameters():  # norms and biases too must matter
        nn.init.normal_(parameter, std=0.3)
    renamed = {
        "updator": "kernel_update_conv",
        "attention.in_proj.": "attention.in_proj_",
        "ffn.0": "ffn1",
        "ffn.2": "ffn2",
        "mask_fc.0": "mask_fc",
        "mask_fc.1": "mask_norm",
    }
    state = {}
    for key, value in ours.state_dict().items():
        start = next((old for old in renamed if key.startswith(old)), None)
        state[renamed[start] + key[len(start) :] if start else key] = value
    reference.load_state_dict(state)
    return ours.eval(), reference.eval()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("seed", range(4))
def test_a_stage_is_mmsegmentations(
    parts: int, dtype: torch.dtype, allowed: float, seed: int
) -> None:
    torch.manual_seed(seed)
    heads, depth = int(torch.randint(1, 4, ())), 2 * int(torch.randint(2, 6, ()))
    batch, count, height, width = (int(torch.randint(2, 12, ())) for _ in range(4))
    channels = heads * depth
    ours, mmseg = (m.to(dtype) for m in pair(channels, channels // parts, heads, 24))
    features = torch.randn(batch, channels, height, width, dtype=dtype)
    kernels = torch.randn(batch, count, channels, dtype=dtype)
    masks = torch.randn(batch, count, height, width, dtype=dtype)
    with torch.no_grad():
        for mine, reference in zip(
            ours(features, kernels, masks)[:2], mmseg(features, kernels, masks), strict=True
        ):
            assert mine.shape == reference.shape
            scale = float(reference.abs().max())
            difference = float((mine - reference).abs().max()) / max(scale, 1.0)
            assert difference <= allowed, f"{difference:.2e} at a scale of {scale:.1f}"


def test_attention_takes_the_weights_of_torchs_own() -> None:
    torch.manual_seed(0)
    reference = nn.MultiheadAttention(24, 3, batch_first=True)
    ours = KernelAttention(24, 3)
    ours.load_state_dict(
        {key.replace("in_proj_", "in_proj."): v for key, v in reference.state_dict().items()}
    )
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(ours(x), reference(x, x, x, need_weights=False)[0])


def test_images_of_a_batch_do_not_touch_one_another() -> None:
    torch.manual_seed(0)
    stage, _ = pair(16, 8, 2, 32)
    stage = stage.double()
    features, masks = torch.randn(3, 16, 5, 4).double(), torch.randn(3, 6, 5, 4).double()
    kernels = torch.randn(3, 6, 16).double()
    together = stage(features, kernels, masks)[:2]
    alone = stage(features[1:2], kernels[1:2], masks[1:2])[:2]
    for both, one in zip(together, alone, strict=True):
        torch.testing.assert_close(both[1:2], one)
