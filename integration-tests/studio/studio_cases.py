"""Model classes of DiffSynth-Studio in small configurations: how to build and how to call them."""

from typing import Any

import torch
from studio_case import Call, Case
from torch import Tensor

IDS = torch.arange(3, 11)[None]


def qwen_image(model: Any, draw: Any) -> Tensor:
    from diffsynth.pipelines.qwen_image import model_fn_qwen_image

    return model_fn_qwen_image(
        dit=model, latents=draw(1, 4, 8, 8), timestep=torch.tensor([500.0], dtype=torch.bfloat16),
        prompt_emb=draw(1, 5, 24), prompt_emb_mask=torch.ones(1, 5, dtype=torch.long), height=64, width=64,
    )  # fmt: skip


def flux(model: Any, draw: Any) -> Tensor:
    from diffsynth.pipelines.flux_image import model_fn_flux_image

    return model_fn_flux_image(
        dit=model, latents=draw(1, 4, 8, 8), timestep=torch.tensor([500.0], dtype=torch.bfloat16),
        prompt_emb=draw(1, 5, 40), pooled_prompt_emb=draw(1, 20), text_ids=torch.zeros(1, 5, 3),
        guidance=torch.tensor([3.5], dtype=torch.bfloat16),
    )  # fmt: skip


def flux_controlnet(model: Any, draw: Any) -> Any:
    joint, single = model(
        draw(1, 4, 8, 8), draw(1, 4, 8, 8), timestep=torch.tensor([500.0], dtype=torch.bfloat16),
        prompt_emb=draw(1, 5, 40), pooled_prompt_emb=draw(1, 20), text_ids=torch.zeros(1, 5, 3),
        guidance=torch.tensor([3.5], dtype=torch.bfloat16),
    )  # fmt: skip
    return [*joint, *single]


def flux2(model: Any, draw: Any) -> Tensor:
    return model(
        hidden_states=draw(1, 16, 8), encoder_hidden_states=draw(1, 5, 24), timestep=torch.tensor([0.5]),
        img_ids=torch.arange(64).view(1, 16, 4), txt_ids=torch.zeros(1, 5, 4), guidance=torch.tensor([4.0]),
    )  # fmt: skip


def z_image(model: Any, draw: Any) -> Tensor:
    from diffsynth.pipelines.z_image import model_fn_z_image

    timestep = torch.tensor([500.0], dtype=torch.bfloat16)
    return model_fn_z_image(model, latents=draw(1, 4, 8, 8), timestep=timestep, prompt_embeds=[draw(5, 24)])


def z_image_controlnet(model: Any, draw: Any) -> Any:
    unified = draw(1, 8, 32)
    freqs_cis = torch.ones(1, 8, 4, dtype=torch.complex64)
    kwargs = {"attn_mask": None, "freqs_cis": freqs_cis, "adaln_input": draw(1, 32)}
    return model.forward_layers(unified, draw(1, 4, 32), draw(1, 4, 32), [4], kwargs)


def wan(model: Any, draw: Any) -> Tensor:
    from diffsynth.pipelines.wan_video import model_fn_wan_video

    return model_fn_wan_video(
        dit=model, latents=draw(1, 4, 2, 8, 8), timestep=torch.tensor([500.0], dtype=torch.bfloat16),
        context=draw(1, 6, 24),
    )  # fmt: skip


def vace(model: Any, draw: Any) -> Any:
    freqs = torch.ones(32, 1, 8, dtype=torch.complex64)
    return model(draw(1, 32, 32), [draw(8, 2, 8, 8)], draw(1, 6, 32), draw(1, 6, 32), freqs)


def ltx(model: Any, draw: Any) -> Any:
    return model(
        video_latents=draw(1, 8, 12), video_positions=torch.arange(48.0).view(1, 3, 8, 2),
        video_context=draw(1, 5, 24), video_timesteps=torch.full((1, 8, 1), 0.5, dtype=torch.bfloat16),
        audio_latents=draw(1, 6, 12), audio_positions=torch.arange(12.0).view(1, 1, 6, 2),
        audio_context=draw(1, 5, 24), audio_timesteps=torch.full((1, 6, 1), 0.5, dtype=torch.bfloat16),
        sigma=torch.tensor([0.5]),
    )  # fmt: skip


def lingbot(model: Any, draw: Any) -> Tensor:
    return model(draw(1, 4, 2, 8, 8), torch.tensor([500.0]), draw(1, 6, 24))


def ernie(model: Any, draw: Any) -> Tensor:
    timestep = torch.tensor([500.0])
    return model(draw(1, 8, 4, 4), timestep, draw(1, 5, 24), torch.tensor([5]))


def unet(model: Any, draw: Any) -> Tensor:
    return model(draw(1, 4, 8, 8), torch.tensor([500]), draw(1, 6, 16), return_dict=False)[0]


def sdxl_unet(model: Any, draw: Any) -> Tensor:
    added = {"text_embeds": draw(1, 12), "time_ids": torch.arange(6.0)[None]}
    out = model(
        draw(1, 4, 8, 8), torch.tensor([500]), draw(1, 6, 16), added_cond_kwargs=added, return_dict=False
    )
    return out[0]


def autoencoder(shape: tuple[int, ...]) -> Call:
    def call(model: Any, draw: Any) -> Any:
        latents = model.encode(draw(*shape))
        latents = latents.mode() if hasattr(latents, "mode") and not isinstance(latents, Tensor) else latents
        return [latents, model.decode(latents)]

    return call


def wan_vae(model: Any, draw: Any) -> Any:
    latents = model.encode([draw(3, 5, 16, 16)], device="cpu")
    return [latents, model.decode(latents.to(torch.bfloat16), device="cpu")]


def tokens(model: Any, draw: Any) -> Any:
    out = model(IDS)
    return out if isinstance(out, (Tensor, tuple)) else out.last_hidden_state


def hidden_states(model: Any, draw: Any) -> Any:
    out = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), output_hidden_states=True)
    return out if isinstance(out, (Tensor, tuple)) else out.hidden_states


SMALL_TEXT: dict[int | str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "max_window_layers": 2,
}  # fmt: skip
FLUX: dict[int | str, Any] = {3072: 32, 24: 2, 768: 20, 4096: 40, 64: 16, 38: 2, 16: 4, 56: 6}
CLIP = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 64, "max_position_embeddings": 16,
}  # fmt: skip
SMALL_UNET = {
    "block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 16, "norm_num_groups": 8,
    "attention_head_dim": 2,
}  # fmt: skip

CASES = {
    "qwen-image": Case(
        "qwen_image_dit.QwenImageDiT",
        qwen_image,
        {"num_layers": 2},
        {"QwenImageDiT": {3072: 32, 3584: 24, 64: 16, 24: 2, 128: 16, 16: 4, 56: 6}},
    ),
    "flux": Case("flux_dit.FluxDiT", flux, {"num_blocks": 1, "input_dim": 16}, {"FluxDiT": FLUX}),
    "flux2": Case(
        "flux2_dit.Flux2DiT",
        flux2,
        {
            "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 4, 4, 4),
        },
    ),
    "z-image": Case(
        "z_image_dit.ZImageDiT",
        z_image,
        {
            "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
            "cap_feat_dim": 24, "axes_dims": [4, 6, 6],
        },
    ),
    "ernie-image": Case(  # reads the dtype of a weight
        "ernie_image_dit.ErnieImageDiT",
        ernie,
        {
            "hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 48,
            "in_channels": 8, "out_channels": 8, "text_in_dim": 24, "rope_axes_dim": (4, 6, 6),
        },
    ),
    "wan": Case(  # parameters beside children: modulation
        "wan_video_dit.WanModel",
        wan,
        {
            "dim": 48, "in_dim": 4, "ffn_dim": 48, "out_dim": 4, "text_dim": 24, "freq_dim": 16, "eps": 1e-6,
            "patch_size": (1, 2, 2), "num_heads": 2, "num_layers": 2, "has_image_input": False,
        },
    ),
    "wan-vace": Case(
        "wan_video_vace.VaceWanModel",
        vace,
        {"vace_layers": (0, 2), "vace_in_dim": 8, "dim": 32, "num_heads": 2, "ffn_dim": 48},
    ),
    "ltx": Case(
        "ltx2_dit.LTXModel",
        ltx,
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 12, "out_channels": 12,
            "num_layers": 2, "cross_attention_dim": 32, "caption_channels": 24,
            "audio_num_attention_heads": 2, "audio_attention_head_dim": 8, "audio_in_channels": 12,
            "audio_out_channels": 12, "audio_cross_attention_dim": 16,
        },
    ),
    "lingbot-video": Case(  # experts: parameters beside children, read by the parent
        "lingbot_video_dit.LingBotVideoDiT",
        lingbot,
        {
            "in_channels": 4, "out_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "depth": 2,
            "intermediate_size": 48, "text_dim": 24, "freq_dim": 16, "axes_dims": (4, 6, 6),
            "axes_lens": (64, 32, 32), "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
    ),
    "stable-diffusion-unet": Case(
        "stable_diffusion_unet.UNet2DConditionModel",
        unet,
        {
            **SMALL_UNET, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        dtype=torch.float32,
    ),
    "sdxl-unet": Case(
        "stable_diffusion_xl_unet.SDXLUNet2DConditionModel",
        sdxl_unet,
        {
            **SMALL_UNET, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 60,
            "use_linear_projection": True, "attention_head_dim": [2, 4],
            "transformer_layers_per_block": [1, 1],
        },
        dtype=torch.float32,
    ),
    "stable-diffusion-vae": Case(
        "stable_diffusion_vae.StableDiffusionVAE",
        autoencoder((1, 3, 16, 16)),
        {
            "block_out_channels": (16, 32), "norm_num_groups": 8,
            "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
        dtype=torch.float32,
    ),
    "flux-vae-decoder": Case(  # no map: managed as one layer
        "flux_vae.FluxVAEDecoder",
        lambda model, draw: model(draw(1, 16, 4, 4)),
        sizes={"FluxVAEDecoder": {128: 32, 256: 32, 512: 32}},
    ),
    "flux2-vae": Case(  # parameters that are integers
        "flux2_vae.Flux2VAE",
        autoencoder((1, 3, 16, 16)),
        {"latent_channels": 4, "block_out_channels": (16, 16), "layers_per_block": 1, "num_groups": 8},
    ),
    "qwen-image-vae": Case("qwen_image_vae.QwenImageVAE", autoencoder((1, 3, 16, 16)), {"base_dim": 8}),
    "wan-vae": Case("wan_video_vae.WanVideoVAE", wan_vae, sizes={"VideoVAE_": {"dim": 8}}),
    "ltx-video-decoder": Case(
        "ltx2_video_vae.LTX2VideoDecoder",
        lambda model, draw: model(draw(1, 8, 2, 4, 4)),
        {"in_channels": 8, "base_channels": 8},
    ),
    "t5": Case(  # tied: shared.weight and encoder.embed_tokens.weight
        "flux_text_encoder_t5.FluxTextEncoderT5",
        tokens,
        sizes={
            "FluxTextEncoderT5": {
                "d_ff": 48, "d_kv": 8, "d_model": 32, "num_heads": 4, "num_layers": 2, "vocab_size": 64,
                "num_decoder_layers": 2,
            }
        },
    ),
    "clip": Case("stable_diffusion_text_encoder.SDTextEncoder", tokens, CLIP),
    "flux-clip": Case(
        "flux_text_encoder_clip.FluxTextEncoderClip",
        tokens,
        {"embed_dim": 768, "vocab_size": 64, "max_position_embeddings": 8, "num_encoder_layers": 2,
         "encoder_intermediate_size": 48},
    ),
    "sdxl-clip": Case(
        "stable_diffusion_xl_text_encoder.SDXLTextEncoder2", tokens, {**CLIP, "projection_dim": 12}
    ),
    "wan-text-encoder": Case(
        "wan_video_text_encoder.WanTextEncoder",
        tokens,
        {"vocab": 64, "dim": 32, "dim_attn": 32, "dim_ffn": 48, "num_heads": 4, "num_layers": 2},
    ),
    "z-image-text-encoder": Case(
        "z_image_text_encoder.ZImageTextEncoder", hidden_states, sizes={"ZImageTextEncoder": SMALL_TEXT}
    ),
    "flux2-text-encoder": Case(
        "flux2_text_encoder.Flux2TextEncoder",
        lambda model, draw: hidden_states(model.model.language_model, draw),
        sizes={"Flux2TextEncoder": SMALL_TEXT}
    ),
    "qwen-image-text-encoder": Case(  # rotary buffers, and a map that names a class which is gone
        "qwen_image_text_encoder.QwenImageTextEncoder",
        hidden_states,
        sizes={
            "QwenImageTextEncoder": {
                **SMALL_TEXT, "mrope_section": [1, 1, 2], "depth": 1, "num_heads": 2, "out_hidden_size": 32,
                "fullatt_block_indexes": [0], "layer_types": ["full_attention"] * 2,
            }
        },
    ),
    "moss-text-encoder": Case(  # a parent that reads the weight of a convolution
        "moss_image_text_encoder.MOSSImageTextEncoder",
        hidden_states,
        sizes={
            "MOSSImageTextEncoder": {
                **SMALL_TEXT, "num_hidden_layers": 4, "head_dim": 16, "mrope_section": [1, 1, 0],
                "layer_types": ["linear_attention"] * 3 + ["full_attention"], "linear_key_head_dim": 8,
                "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_value_head_dim": 8,
            }
        },
    ),
    "flux-controlnet": Case(
        "flux_controlnet.FluxControlNet",
        flux_controlnet,
        {"num_joint_blocks": 1, "num_single_blocks": 1},
        {"FluxControlNet": FLUX},
    ),
    "qwen-image-controlnet": Case(
        "qwen_image_controlnet.QwenImageBlockWiseControlNet",
        lambda model, draw: model.blockwise_forward(
            draw(1, 4, 32), model.process_controlnet_conditioning(draw(1, 4, 16)), 1
        ),
        {"num_layers": 2, "in_dim": 16, "dim": 32},
    ),
    "z-image-controlnet": Case(
        "z_image_controlnet.ZImageControlNet",
        z_image_controlnet,
        {"control_layers_places": (0, 2), "control_in_dim": 4, "dim": 32, "n_refiner_layers": 1},
        {"ZImageControlTransformerBlock": {"dim": 32, "n_heads": 4, "n_kv_heads": 4}},
    ),
}  # fmt: skip
