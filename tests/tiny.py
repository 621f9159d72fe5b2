"""Complete but tiny and random models as diffusers lays them out: 32 px pictures, 0.1 M parameters."""

from __future__ import annotations

from pathlib import Path

import torch

from hypersd.adapters import AdapterFile, save
from hypersd.backbone import Backbone
from hypersd.methods import METHODS
from hypersd.records import Adapter
from hypersd.roles import Roles

WORDS = ("a", "happy", "cat", "dog", "red", "heart", "style")
TOKENS = 12  # how many the text encoder reads, marks of start and end included
SIZE_PX = 32


def build(folder: Path, prediction: str = "v_prediction", set_alpha_to_one: bool = False) -> Path:
    """Write the model to `folder`: equal arguments give equal weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    words = tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            projection_dim=16,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
        unet = UNet2DConditionModel(
            sample_size=SIZE_PX // 8,
            in_channels=8,
            out_channels=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
        )
        vae = AutoencoderKL(
            sample_size=SIZE_PX,
            latent_channels=8,
            layers_per_block=1,
            block_out_channels=(4, 4, 8, 8),
            norm_num_groups=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            mid_block_add_attention=False,
            scaling_factor=0.8,  # not 1, so that a forgotten factor shows
        )
        text_encoder = CLIPTextModel(text)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=set_alpha_to_one,
        steps_offset=1,  # means nothing to trailing spacing, but diffusers warns about 0
        prediction_type=prediction,
        timestep_spacing="trailing",
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=words,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def build_decoder(folder: Path, channels: int = 8) -> Path:
    """A quick decoder for the latents of `build`."""
    from diffusers import AutoencoderTiny

    with torch.random.fork_rng():
        torch.manual_seed(3)
        AutoencoderTiny(
            latent_channels=channels, encoder_block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4,
            num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4,
        ).save_pretrained(folder)  # fmt: skip
    return folder


def build_xl(folder: Path) -> Path:
    """The same in StableDiffusionXLPipeline's layout: two text encoders, a pooled state, sizes; 64 px pictures."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words, others = tokenizer(), tokenizer(pad="!")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = {
            "vocab_size": len(words), "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "max_position_embeddings": TOKENS, "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id,
        }  # fmt: skip
        unet = UNet2DConditionModel(
            sample_size=8,
            layers_per_block=2,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=16 + 24,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=20 + 6 * 4,
        )
        vae = AutoencoderKL(
            sample_size=64,
            latent_channels=4,
            layers_per_block=1,
            block_out_channels=(4, 4, 8, 8),
            norm_num_groups=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            scaling_factor=0.8,
            force_upcast=True,
        )
        first = CLIPTextModel(CLIPTextConfig(hidden_size=16, projection_dim=16, **text))
        second = CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=24, projection_dim=20, hidden_act="gelu", **text)
        )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading",
    )  # fmt: skip
    pipeline = StableDiffusionXLPipeline(
        vae=vae, text_encoder=first, text_encoder_2=second, tokenizer=words, tokenizer_2=others, unet=unet,
        scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def build_sd3(folder: Path, shift: bool = False) -> Path:
    """The same in StableDiffusion3Pipeline's layout: a transformer and rectified flow, three text encoders."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=48, caption_projection_dim=16, pooled_projection_dim=16 + 20, pos_embed_max_size=8,
        )  # fmt: skip
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=shift),
            vae=_flow_vae(), text_encoder=_clip(True, 16), tokenizer=tokenizer(), text_encoder_2=_clip(True, 24, 20),
            tokenizer_2=tokenizer(pad="!"), text_encoder_3=_t5(48), tokenizer_3=_unigram(),
        )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def build_flux(folder: Path) -> Path:
    """The same in FluxPipeline's layout."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=48, pooled_projection_dim=16, guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096,
        )  # fmt: skip
        pipeline = FluxPipeline(
            transformer=transformer, scheduler=scheduler, vae=_flow_vae(), text_encoder=_clip(False, 16),
            tokenizer=tokenizer(), text_encoder_2=_t5(48), tokenizer_2=_unigram(),
        )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def _flow_vae():  # type: ignore[no-untyped-def]
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=64, latent_channels=4, layers_per_block=1, block_out_channels=(4, 4, 8, 8), norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.8, shift_factor=0.1,
    )  # fmt: skip


def _clip(projected: bool, width: int, projection: int = 16):  # type: ignore[no-untyped-def]
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, projection_dim=projection, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=TOKENS,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _t5(width: int):  # type: ignore[no-untyped-def]
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    )


def _unigram():  # type: ignore[no-untyped-def]
    """A tokenizer of T5's kind that knows letters and WORDS."""
    from transformers import T5Tokenizer

    letters = [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz,"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -3.0), *letters]
    pieces += [(f"\u2581{word}", -2.0) for word in WORDS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def adapters(model: Path, folder: Path, rank: int = 2, only: tuple[str, ...] = ()) -> list[AdapterFile]:
    """A random LoRA for every stage of every method that is trained, and every number of steps that others are offered
    for; equal models give equal files."""
    files = []
    with torch.random.fork_rng():
        torch.manual_seed(1)
        backbone = Backbone.load(model)
        role = Roles(backbone.unet).add("any", rank=rank)
        wanted = [m for m in METHODS.values() if m.adapted and (not only or m.name in only)]
        for method in sorted(wanted, key=lambda m: not m.stages):  # those trained here first: each keeps its numbers
            for segments in [stage.segments for stage in method.stages] or method.steps.suggested:
                random = {name: 0.1 * torch.randn_like(tensor) for name, tensor in role.adapter().items()}
                card = Adapter(
                    name=method.name, method=method.name, backbone="tiny", base_sha256=backbone.network_sha256,
                    segments=segments, rank=rank, guidance=method.guidance, eta=method.eta, updates=0,
                    data="", commit="", recipe={},
                )  # fmt: skip
                files.append(save(folder / f"{method.name}-{segments}.safetensors", random, card))
    return files


def tokenizer(pad: str = "<|endoftext|>"):  # type: ignore[no-untyped-def]
    """CLIP's byte-pair tokenizer whose merges spell WORDS; everything else is read letter by letter."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = alphabet + [letter + "</w>" for letter in alphabet]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left, *rest = [*word[:-1], word[-1] + "</w>"]
        for right in rest:
            merges.append((left, right))
            left += right
            vocabulary.append(left)
    vocabulary = list(dict.fromkeys([*vocabulary, "<|startoftext|>", "<|endoftext|>"]))
    ids = {token: number for number, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=ids, merges=list(dict.fromkeys(merges)), model_max_length=TOKENS, pad_token=pad)
