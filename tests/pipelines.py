"""Tiny random pipelines of diffusers with text encoders, tokenizers of a few words and VAEs: FLUX, PixArt and Wan."""

from pathlib import Path

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from dit2deploy.models.flux import FLUX
from dit2deploy.models.pixart import PIXART
from dit2deploy.models.wan import WAN
from tests.packing import tiny_module

WORDS = ("<pad>", "</s>", "<unk>", "a", "cat", "dog", "red", "and")
TOKENS = 12


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=TOKENS, **names)


def t5(kind: str = "T5") -> torch.nn.Module:
    sizes = {"vocab_size": 16, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return getattr(transformers, f"{kind}EncoderModel")(getattr(transformers, f"{kind}Config")(**sizes)).eval()


def clip() -> torch.nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=16,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        eos_token_id=1,
    )
    return transformers.CLIPTextModel(config).eval()


def flux(folder: Path) -> Path:
    """Draws by default 8 x 8 latents of 2 channels; 8 x 8 pixels are 8 x 8 latents of them."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(latent_channels=2, block_out_channels=(8,), norm_num_groups=4, shift_factor=0.0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    parts = (scheduler, vae, clip(), tokenizer(), t5(), tokenizer(), tiny_module(FLUX))
    diffusers.FluxPipeline(*parts).save_pretrained(folder)
    return folder


def pixart(folder: Path) -> Path:
    """Draws 16 x 16 pixels, 8 x 8 latents."""
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(),
        vae=diffusers.AutoencoderKL(latent_channels=4, **blocks, **kinds),
        transformer=tiny_module(PIXART),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    ).save_pretrained(folder)
    return folder


def wan(folder: Path) -> Path:
    """Compresses 8 times in height and width and 4 times in time."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    diffusers.WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5("UMT5"),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=tiny_module(WAN),
    ).save_pretrained(folder)
    return folder
