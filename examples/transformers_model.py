"""A model of Hugging Face Transformers on FlashCore's attention, by name.

python examples/transformers_model.py                      a tiny model with random weights: nothing is downloaded
python examples/transformers_model.py --model NAME_OR_PATH --prompt "Once upon a time"
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import flashcore.integrations.transformers  # noqa: F401 (it registers "fcore")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="name on the hub, or a folder")
    parser.add_argument("--prompt", default="Attention is")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    if arguments.model:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model, attn_implementation="fcore", dtype="auto"
        )
        prompt = tokenizer(arguments.prompt, return_tensors="pt").input_ids
    else:
        config = LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, attn_implementation="fcore")
        prompt = torch.randint(1, 128, (1, 12))
    model, prompt = model.to(DEVICE).eval(), prompt.to(DEVICE)

    tokens = model.generate(prompt, max_new_tokens=20, do_sample=False)
    if arguments.model:
        print(tokenizer.decode(tokens[0]))
    print(f"{prompt.shape[1]} tokens in, {tokens.shape[1] - prompt.shape[1]} out")

    with torch.no_grad():
        ours = model(prompt).logits
        model.set_attn_implementation("sdpa")
        difference = (ours - model(prompt).logits).abs().max().item()
    print(f"logits differ from those with PyTorch's attention by at most {difference:.1e}")


if __name__ == "__main__":
    main()
