"""How DINO and iBOT are usually trained: what `pretrain.py` measures against (written from the papers' formulas).

    python benchmarks/pretrain.py

Views are made one by one with Pillow and torchvision in the loader's worker; a ViT with explicit attention runs once for
each size of view; iBOT's head scores every patch of the global views; gradients are clipped and the teacher moved one
parameter after the other, with a wait for the device at each. DINO: Caron et al. 2021, arXiv 2104.14294; iBOT: Zhou et
al. 2022, arXiv 2111.07832. Where the original codes do what no result needs (patches hidden in local views, scores of
their patches), it is left out.
"""

import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import nn
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from hf_pathology.modeling.configuration_dino import DinoConfig
from hf_pathology.modeling.configuration_ibot import IbotConfig
from hf_pathology.modeling.teacher_student import TeacherStudent
from hf_pathology.tiles.hidden import HiddenOptions
from hf_pathology.tiles.views import ViewOptions


class PlainViews:
    """The views of a Pillow image, float32 (3, size, size) each, the global ones first; and what is hidden in these."""

    def __init__(self, options: ViewOptions, hidden: HiddenOptions | None = None, patch: int = 16):
        strength = transforms.ColorJitter(*options.jitter)
        colours = [
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([strength], options.jitter_probability),
            transforms.RandomGrayscale(options.gray),
        ]
        ending = [transforms.ToTensor(), transforms.Normalize(options.mean, options.std)]

        def of_one_kind(size: int, scale: Sequence[float], blur: float, solarize: float) -> Callable:
            crop = transforms.RandomResizedCrop(size, tuple(scale), interpolation=InterpolationMode.BICUBIC)
            changes = [GaussianBlur(blur, options.blur_sigma), Solarize(solarize)]
            return transforms.Compose([crop, *colours, *changes, *ending])

        first, other, local = options.blur
        globals_ = [(first, 0.0), (other, options.solarize)][: options.global_views]
        self.each = [of_one_kind(options.global_size, options.global_scale, *chances) for chances in globals_]
        self.each += [of_one_kind(options.local_size, options.local_scale, local, 0.0)] * options.local_views
        self.n_global, self.hidden, self.edge = len(globals_), hidden, options.global_size // patch

    def __call__(self, image: Image.Image) -> tuple[list[torch.Tensor], list[np.ndarray]]:
        hidden = [draw_hidden(self.edge, self.hidden) for _ in range(self.n_global)] if self.hidden else []
        return [make(image) for make in self.each], hidden


class GaussianBlur:
    """Pillow's blur with a random radius, of a share of the images."""

    def __init__(self, probability: float, radii: Sequence[float]):
        self.probability, self.radii = probability, radii

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.probability:
            return image
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.radii)))


class Solarize:
    """Inverts the bright values of a share of the images."""

    def __init__(self, probability: float):
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if random.random() < self.probability else image


def draw_hidden(edge: int, options: HiddenOptions) -> np.ndarray:
    """Blocks of hidden patches of one view, bool (edge, edge), laid one by one as BEiT does (arXiv 2106.08254)."""
    hidden = np.zeros((edge, edge), bool)
    choice = random.randrange(len(options.hidden_shares))
    spread = options.hidden_spreads[choice]
    budget = (options.hidden_shares[choice] + random.uniform(-spread, spread)) * edge**2
    placed = True
    while placed and budget - hidden.sum() >= 1:
        for _ in range(10):
            area = random.uniform((edge // 3) ** 2, budget - hidden.sum())
            aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if placed := 0 < rows < edge and 0 < columns < edge:
                top, left = random.randint(0, edge - rows), random.randint(0, edge - columns)
                block = hidden[top : top + rows, left : left + columns]
                if placed := 0 < block.size - block.sum() <= budget - hidden.sum():
                    block[...] = True
                    break
    return hidden


class PlainTiles(Dataset):
    """The views of image files, each decoded by Pillow whenever it is asked for."""

    def __init__(self, paths: Sequence[Path], views: PlainViews):
        self.paths, self.views = paths, views

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: int) -> tuple[list[torch.Tensor], list[np.ndarray]]:
        with Image.open(self.paths[item]) as image:
            return self.views(image.convert("RGB"))


class PlainViT(nn.Module):
    """A ViT with one matrix for query, key and value, and attention written out."""

    def __init__(self, width: int, depth: int, heads: int, patch: int, image_size: int, drop_path: float = 0.0):
        super().__init__()
        self.patch, self.edge = patch, image_size // patch
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + self.edge**2, width))
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.ModuleList(PlainBlock(width, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens (B, 1 + patches, D) of `pixels` (B, 3, H, W), of which the patches `hidden`, bool (B, h, w), are not seen."""
        tokens = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        if hidden is not None:
            tokens = torch.where(hidden.flatten(1)[..., None], self.mask_token.to(tokens.dtype), tokens)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = tokens + self.positions(pixels.shape[2] // self.patch, pixels.shape[3] // self.patch)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def positions(self, rows: int, columns: int) -> torch.Tensor:
        if rows == columns == self.edge:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, self.edge, self.edge, -1).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(grid, size=(rows, columns), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int, drop_path: float):
        super().__init__()
        self.heads, self.drop_path = heads, drop_path
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2, self.act = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.GELU()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens + self.dropped(self.attend(self.norm1(tokens)))
        return tokens + self.dropped(self.fc2(self.act(self.fc1(self.norm2(tokens)))))

    def attend(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, count, width = tokens.shape
        size = width // self.heads
        query, key, value = self.qkv(tokens).reshape(batch, count, 3, self.heads, size).permute(2, 0, 3, 1, 4)
        weights = ((query @ key.transpose(-2, -1)) * size**-0.5).softmax(dim=-1)
        return self.proj((weights @ value).transpose(1, 2).reshape(batch, count, width))

    def dropped(self, branch: torch.Tensor) -> torch.Tensor:
        if self.drop_path == 0 or not self.training:
            return branch
        keep = torch.rand(len(branch), 1, 1, dtype=branch.dtype, device=branch.device).add(1 - self.drop_path).floor()
        return branch.div(1 - self.drop_path) * keep


class PlainHead(nn.Module):
    def __init__(self, in_dim: int, hidden_dim: int, bottleneck_dim: int, out_dim: int):
        super().__init__()
        first, second = nn.Linear(in_dim, hidden_dim), nn.Linear(hidden_dim, hidden_dim)
        self.mlp = nn.Sequential(first, nn.GELU(), second, nn.GELU(), nn.Linear(hidden_dim, bottleneck_dim))
        self.weight_v = nn.Parameter(torch.randn(out_dim, bottleneck_dim))
        self.register_buffer("weight_g", torch.ones(out_dim, 1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        bottleneck = nn.functional.normalize(self.mlp(tokens), dim=-1)
        return nn.functional.linear(bottleneck, torch._weight_norm(self.weight_v, self.weight_g, 0))


class PlainDino(nn.Module):
    """DINO, and what iBOT has of it."""

    def __init__(self, config: DinoConfig | IbotConfig):
        super().__init__()
        vit, self.config = config.encoder_config, config
        size = (vit.hidden_size, vit.num_hidden_layers, vit.num_attention_heads, vit.patch_size, vit.image_size)
        head = (vit.hidden_size, config.head_hidden_dim, config.head_bottleneck_dim, config.out_dim)
        self.student, self.teacher = PlainViT(*size, config.drop_path_rate), PlainViT(*size)
        self.student_head, self.teacher_head = PlainHead(*head), PlainHead(*head)
        self.register_buffer("center", torch.zeros(1, config.out_dim))
        self.pairs = [(self.teacher, self.student), (self.teacher_head, self.student_head)]
        for teacher, student in self.pairs:
            teacher.load_state_dict(student.state_dict())
            teacher.requires_grad_(False)
        self.student.mask_token.requires_grad_(isinstance(config, IbotConfig))  # of no use to DINO

    def forward(self, views: list[torch.Tensor], hidden: list[torch.Tensor]) -> torch.Tensor:
        """The loss of V global views (B, 3, H, W) and local ones; the centre has moved."""
        n_global = sum(view.shape == views[0].shape for view in views)
        with torch.no_grad():
            taught = self.teacher_head(self.teacher(torch.cat(views[:n_global]))[:, 0])
        tokens = [self.student(torch.cat(views[:n_global]))[:, 0]]
        if len(views) > n_global:
            tokens.append(self.student(torch.cat(views[n_global:]))[:, 0])
        seen = self.student_head(torch.cat(tokens))
        loss = self.between_views(seen.chunk(len(views)), taught, n_global)
        self.move_center(self.center, taught.mean(dim=0), self.config.center_momentum)
        return loss

    def between_views(self, seen: Sequence[torch.Tensor], taught: torch.Tensor, n_global: int) -> torch.Tensor:
        targets = ((taught - self.center) / self.config.teacher_temperature).softmax(dim=-1).chunk(n_global)
        losses = []
        for i, target in enumerate(targets):
            for j, scores in enumerate(seen):
                if i != j:
                    logs = (scores / self.config.student_temperature).log_softmax(dim=-1)
                    losses.append((-target * logs).sum(dim=-1).mean())
        return sum(losses) / len(losses)

    @torch.no_grad()
    def move_center(self, center: torch.Tensor, mean: torch.Tensor, momentum: float) -> None:
        center.copy_(center * momentum + mean * (1 - momentum))


class PlainIbot(PlainDino):
    """iBOT with one head for images and patches."""

    def __init__(self, config: IbotConfig):
        super().__init__(config)
        self.register_buffer("patch_center", torch.zeros(1, 1, config.out_dim))

    def forward(self, views: list[torch.Tensor], hidden: list[torch.Tensor]) -> torch.Tensor:
        config, n_global = self.config, len(hidden)
        with torch.no_grad():
            taught = self.teacher_head(self.teacher(torch.cat(views[:n_global])))
        seen = self.student_head(self.student(torch.cat(views[:n_global]), torch.cat(hidden)))
        images = [seen[:, 0]]
        if len(views) > n_global:
            images.append(self.student_head(self.student(torch.cat(views[n_global:]))[:, 0]))
        cls_loss = self.between_views(torch.cat(images).chunk(len(views)), taught[:, 0], n_global)

        targets = ((taught[:, 1:] - self.patch_center) / config.teacher_patch_temperature).softmax(dim=-1)
        losses = []
        for target, patches, mask in zip(targets.chunk(n_global), seen[:, 1:].chunk(n_global), hidden):
            logs = (patches / config.student_temperature).log_softmax(dim=-1)
            each = (-target * logs).sum(dim=-1)  # (B, patches)
            mask = mask.flatten(1)
            losses.append(((each * mask).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)).mean())
        patch_loss = sum(losses) / len(losses)
        self.move_center(self.center, taught[:, 0].mean(dim=0), config.center_momentum)
        self.move_center(self.patch_center, taught[:, 1:].mean(dim=(0, 1)), config.patch_center_momentum)
        return config.cls_loss_weight * cls_loss + config.patch_loss_weight * patch_loss


class PlainStep:
    """One optimizer step as the original codes take it; `precision` is fp32 or bf16, by autocast."""

    def __init__(self, method: PlainDino, precision: str, *, rate: float, decay: float, clip: float, momentum: float):
        self.method, self.bf16, self.clip, self.momentum = method.train(), precision == "bf16", clip, momentum
        trained = [each for each in method.parameters() if each.requires_grad]
        decayed, others = [each for each in trained if each.ndim > 1], [each for each in trained if each.ndim == 1]
        groups = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, foreach=False, fused=False)

    def __call__(self, views: list[torch.Tensor], hidden: list[torch.Tensor]) -> float:
        """The loss, after which the weights have moved."""
        loss = self.forward(views, hidden)
        self.backward(loss)
        self.clip_gradients()
        self.optimize()
        self.follow()
        return loss.item()

    def forward(self, views: list[torch.Tensor], hidden: list[torch.Tensor]) -> torch.Tensor:
        with torch.autocast(views[0].device.type, torch.bfloat16) if self.bf16 else nullcontext():
            loss = self.method(views, hidden)
        if not math.isfinite(loss.item()):
            raise ValueError("the loss is not finite")
        return loss

    def backward(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()

    def clip_gradients(self) -> None:
        for parameter in self.method.parameters():
            if parameter.grad is not None:
                scale = self.clip / (parameter.grad.norm(2).item() + 1e-6)
                if scale < 1:
                    parameter.grad.mul_(scale)

    def optimize(self) -> None:
        self.optimizer.step()

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the teacher."""
        for teacher, student in self.method.pairs:
            for slow, fast in zip(teacher.parameters(), student.parameters()):
                slow.mul_(self.momentum).add_((1 - self.momentum) * fast)


BLOCK_NAMES = {  # of ours, and of the blocks above
    "attention.o_proj": "proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
}


def take_weights(plain: PlainDino, ours: TeacherStudent) -> None:
    """Gives the plain method the weights and centres of ours, whose trunk is a `vit` and whose prototypes have unit length."""
    state = ours.state_dict()
    taken = {name.removesuffix(".value"): value for name, value in state.items() if "center" in name}
    for name, value in state.items():
        if "_head." in name:
            taken[name.replace("last_layer.", "")] = value
    for who in ("student", "teacher"):
        embeddings = f"{who}.embeddings."
        taken[f"{who}.cls_token"] = state[f"{embeddings}cls_token"]
        taken[f"{who}.pos_embed"] = state[f"{embeddings}position_embeddings"]
        taken[f"{who}.mask_token"] = state.get(f"{embeddings}mask_token", torch.zeros_like(plain.student.mask_token))
        for kind in ("weight", "bias"):
            taken[f"{who}.patch_embed.{kind}"] = state[f"{embeddings}patch_embeddings.projection.{kind}"]
            taken[f"{who}.norm.{kind}"] = state[f"{who}.layernorm.{kind}"]
            for index in range(len(plain.student.blocks)):
                there, here = f"{who}.layers.{index}.", f"{who}.blocks.{index}."
                parts = [state[f"{there}attention.{part}_proj.{kind}"] for part in "qkv"]
                taken[f"{here}qkv.{kind}"] = torch.cat(parts)
                taken |= {f"{here}{new}.{kind}": state[f"{there}{old}.{kind}"] for old, new in BLOCK_NAMES.items()}
    plain.load_state_dict(taken)
