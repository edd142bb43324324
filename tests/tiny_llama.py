"""A Llama of two layers with random weights and a tokenizer of bytes, as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

POSITIONS = 512
END = 256


def save(folder: Path) -> Path:
    """Writes the model and its tokenizer; returns the folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=END + 1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,  # so that it doesn't say one thing whatever it reads
        bos_token_id=END,
        eos_token_id=END,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    codec = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)} | {"<end>": END}, []))
    codec.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    codec.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=codec, eos_token="<end>").save_pretrained(folder)
    return folder
