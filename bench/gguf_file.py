"""A checkpoint as a GGUF file, for the engines that read those.

`write_gguf` needs the package `gguf`, which is no requirement of this
project.
"""

from pathlib import Path


def write_gguf(path: Path, target: Path, dense: str = "BF16") -> None:
    """The folder as a GGUF file: experts MXFP4, matrices BF16 or Q8_0, no
    tokens.

    GGUF keeps one expert's gate and up apart, and a block as one scale byte
    and 16 bytes whose low nibbles are the first sixteen values.
    """
    import gguf
    import numpy as np
    import torch

    from gptoss.weights.checkpoint import Checkpoint

    def block_bytes(blocks, scales):
        values = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
        mixed = values[..., :16] | values[..., 16:] << 4
        return torch.cat([scales[..., None], mixed], -1).flatten(-2)

    with Checkpoint.open(path) as file:
        c = file.config
        out = gguf.GGUFWriter(str(target), "gpt-oss", use_temp_file=True)
        out.add_name("random")
        out.add_vocab_size(c.vocab_size)
        out.add_tokenizer_model("none")
        out.add_context_length(c.max_position_embeddings)
        out.add_embedding_length(c.hidden_size)
        out.add_block_count(c.num_hidden_layers)
        out.add_feed_forward_length(c.intermediate_size)
        out.add_expert_feed_forward_length(c.intermediate_size)
        out.add_head_count(c.num_attention_heads)
        out.add_head_count_kv(c.num_key_value_heads)
        out.add_key_length(c.head_dim)
        out.add_value_length(c.head_dim)
        out.add_layer_norm_rms_eps(c.rms_norm_eps)
        out.add_expert_count(c.num_local_experts)
        out.add_expert_used_count(c.num_experts_per_tok)
        out.add_sliding_window(c.sliding_window)
        out.add_rope_freq_base(c.rope_theta)
        out.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        out.add_rope_scaling_factor(c.rope_factor)
        out.add_rope_scaling_orig_ctx_len(c.initial_context_length)

        def floats(name, source, rows=None, wide=False):
            tensor = file.read(source)
            tensor = tensor if rows is None else tensor[:, rows]
            if wide or tensor.ndim == 1 or source.endswith("bias"):
                out.add_tensor(name, tensor.float().contiguous().numpy())
                return
            kind = gguf.GGMLQuantizationType[dense]
            data = (tensor.contiguous().view(torch.uint8).numpy()
                    if dense == "BF16"
                    else gguf.quants.quantize(tensor.float().numpy(), kind))
            out.add_tensor(name, data, raw_dtype=kind)

        def packed(name, source, rows):
            data = block_bytes(*(file.read(f"{source}_{part}")[:, rows]
                                 for part in ("blocks", "scales")))
            out.add_tensor(name, np.ascontiguousarray(data.numpy()),
                           raw_dtype=gguf.GGMLQuantizationType.MXFP4)

        floats("token_embd.weight", "model.embed_tokens.weight")
        floats("output.weight", "lm_head.weight")
        floats("output_norm.weight", "model.norm.weight")
        for n in range(c.num_hidden_layers):
            here, there = f"model.layers.{n}", f"blk.{n}"
            floats(f"{there}.attn_norm.weight",
                   f"{here}.input_layernorm.weight")
            floats(f"{there}.post_attention_norm.weight",
                   f"{here}.post_attention_layernorm.weight")
            for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"),
                                 ("o", "output")):
                for part in ("weight", "bias"):
                    floats(f"{there}.attn_{theirs}.{part}",
                           f"{here}.self_attn.{ours}_proj.{part}")
            floats(f"{there}.attn_sinks.weight", f"{here}.self_attn.sinks")
            floats(f"{there}.ffn_gate_inp.weight",
                   f"{here}.mlp.router.weight", wide=True)
            floats(f"{there}.ffn_gate_inp.bias", f"{here}.mlp.router.bias")
            experts = f"{here}.mlp.experts"
            for name, source, rows in (
                    ("gate", "gate_up_proj", slice(0, None, 2)),
                    ("up", "gate_up_proj", slice(1, None, 2)),
                    ("down", "down_proj", slice(None))):
                packed(f"{there}.ffn_{name}_exps.weight",
                       f"{experts}.{source}", rows)
                floats(f"{there}.ffn_{name}_exps.bias",
                       f"{experts}.{source}_bias", rows)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
