"""Train pico, the source model that ships with nanorun, on a CPU.

    python scripts/train_pico.py --out nanorun/data/pico

Needs torch, transformers and tokenizers (the `dev` extra). pico is `NemotronHForCausalLM` of
Nano's traits at 6 M parameters: pattern of `M`, `E` and `*`, sigmoid router with a correction
bias, shared expert, squared ReLU, no position embedding, row lengths that are multiples of 64 but
not of 256. What it learns is in `pico_tasks.py`. Progress goes to stdout, a resumable state beside
the output; the router's correction bias is balanced as in DeepSeek-V3 (arXiv 2412.19437, 2.1.2).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pico_tasks import (
    ARITHMETIC,
    BALANCED,
    BROAD,
    COPYING,
    EVERYTHING,
    Conversation,
    Mix,
    addition_pair,
    draw,
    tool_use,
)
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import NemotronHConfig, NemotronHForCausalLM

PATTERN = "MEM*EM*E"
ROW_TOKENS = 512
N_ROWS = 8
N_VOCAB = 1024
N_SPECIAL = 32
IM_END = 11
# Ids of Nemotron 3; the unnamed ones are placeholders there too.
SPECIAL_TOKENS = {
    0: "<unk>", 1: "<s>", 2: "</s>", 10: "<|im_start|>", 11: "<|im_end|>",
    12: "<think>", 13: "</think>", 14: "<tool_call>", 15: "</tool_call>",
}  # fmt: skip
# The pre-tokenizer of Nemotron's tokenizer.json.
PRE_TOKENIZER = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MODEL_CONFIG = {
    "vocab_size": N_VOCAB,
    "hidden_size": 320,
    "hybrid_override_pattern": PATTERN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "intermediate_size": 192,
    "ssm_state_size": 64,
    "mamba_num_heads": 8,
    "mamba_head_dim": 64,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 192,
    "moe_shared_expert_intermediate_size": 320,
    "routed_scaling_factor": 2.5,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def chat_renderer(path: Path) -> jinja2.Template:
    """Compile a chat template with the environment that transformers and nanorun use."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    return environment.from_string(path.read_text(encoding="utf-8"))


def build_tokenizer(renderer: jinja2.Template, rng: random.Random) -> Tokenizer:
    """Train the byte-level BPE vocabulary on rendered conversations; special ids as Nemotron's."""
    specials = [SPECIAL_TOKENS.get(i, f"<SPECIAL_{i}>") for i in range(N_SPECIAL)]
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = []
    for i in range(6000):
        conversation = tool_use(rng, True) if i % 8 == 0 else draw(rng)
        text = renderer.render(messages=conversation.messages, tools=conversation.tools)
        for special in SPECIAL_TOKENS.values():
            text = text.replace(special, "\x00")
        texts += text.split("\x00")
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < N_VOCAB:
        raise SystemExit(f"only {tokenizer.get_vocab_size()} of {N_VOCAB} tokens were learned")
    return tokenizer


def encode(
    tokenizer: Tokenizer, renderer: jinja2.Template, conversation: Conversation
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them the assistant says (those carry the loss)."""
    thinking = conversation.enable_thinking
    render = lambda messages, prompt: renderer.render(  # noqa: E731
        messages=messages,
        tools=conversation.tools,
        add_generation_prompt=prompt,
        enable_thinking=thinking,
    )
    text = render(conversation.messages, False)
    ids, said, done = [], [], 0
    for i, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        prompt = render(conversation.messages[:i], True)
        if not text.startswith(prompt):  # a thinking turn that the template has since truncated
            continue
        end = text.index("<|im_end|>", len(prompt)) + len("<|im_end|>")
        for part, spoken in ((text[done : len(prompt)], False), (text[len(prompt) : end], True)):
            part_ids = tokenizer.encode(part, add_special_tokens=False).ids
            ids += part_ids
            said += [spoken] * len(part_ids)
        done = end
    tail = tokenizer.encode(text[done:], add_special_tokens=False).ids
    return ids + tail, said + [False] * len(tail)


def row(
    tokenizer: Tokenizer, renderer: jinja2.Template, rng: random.Random, mix: Mix
) -> tuple[list[int], list[bool]]:
    """Pack conversations into one row of `ROW_TOKENS + 1` tokens; a tool row begins with tools."""
    ids: list[int] = []
    said: list[bool] = []
    begins_with_tool = rng.random() < mix.tool_rows
    if begins_with_tool:
        conversation = tool_use(rng, rng.random() < mix.think, mix.tool_turns)
    else:
        conversation = draw(rng, mix)
    while len(ids) <= ROW_TOKENS:
        more_ids, more_said = encode(tokenizer, renderer, conversation)
        ids += more_ids
        said += more_said
        conversation = draw(rng, mix)
    return ids[: ROW_TOKENS + 1], said[: ROW_TOKENS + 1]


def batches(
    tokenizer: Tokenizer, renderer: jinja2.Template, rng: random.Random, mix: Mix
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield `(n_rows, ROW_TOKENS)` inputs and targets; target -100 carries no loss."""
    while True:
        rows = [row(tokenizer, renderer, rng, mix) for _ in range(N_ROWS)]
        ids = torch.tensor([r[0] for r in rows])
        said = torch.tensor([r[1] for r in rows])
        targets = ids[:, 1:].masked_fill(~said[:, 1:], -100)
        yield ids[:, :-1].contiguous(), targets


@dataclass(frozen=True)
class Phase:
    """A stretch of the training with one mix; each takes a stretch of a cosine."""

    first: int
    n_steps: int
    mix: Mix
    decay_from: float
    decay_to: float

    def learning_rate(self, step: int, peak: float) -> float:
        """Warm-up over 100 steps, then cosine from `peak` to 5 % of it."""
        share = (step - self.first) / self.n_steps
        progress = self.decay_from + (self.decay_to - self.decay_from) * share
        return (
            peak * min(1.0, (step + 1) / 100) * (0.05 + 0.475 * (1 + math.cos(math.pi * progress)))
        )


PHASES = (
    Phase(0, 1200, BROAD, 0.0, 0.5),
    Phase(1200, 600, ARITHMETIC, 0.5, 0.625),
    Phase(1800, 600, BALANCED, 0.625, 0.875),
    Phase(2400, 800, COPYING, 0.35, 0.6),
    Phase(3200, 600, EVERYTHING, 0.55, 1.0),
)


def build_model() -> NemotronHForCausalLM:
    """A fresh pico. dt is not clamped from below: llama.cpp does not clamp it either."""
    model = NemotronHForCausalLM(NemotronHConfig(**MODEL_CONFIG, time_step_min=1e-3)).float()
    for layer in model.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, float("inf"))
    return model


class RouterBalance:
    """Counts the experts chosen in each MoE layer and nudges the biases to even them out."""

    def __init__(self, model: torch.nn.Module, speed: float = 1e-3) -> None:
        self.speed = speed
        self.counts: dict[torch.nn.Module, torch.Tensor] = {}
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):
                module.register_forward_hook(self._count)

    def _count(
        self, gate: torch.nn.Module, _inputs: object, output: tuple[torch.Tensor, ...]
    ) -> None:
        if gate.training:
            self.counts[gate] = torch.bincount(
                output[2].flatten(), minlength=gate.num_experts
            ).float()

    def update(self) -> None:
        """Raise the bias of experts below their share, lower it above."""
        for gate, counts in self.counts.items():
            gate.e_score_correction_bias += self.speed * torch.sign(counts.mean() - counts)


@torch.no_grad()
def greedy(
    model: NemotronHForCausalLM, tokenizer: Tokenizer, prompts: list[str], n_max: int
) -> list[str]:
    """Greedy replies to prompts of equal token length groups, up to the end of the turn."""
    replies = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        out = model.generate(
            torch.tensor([ids]),
            max_new_tokens=n_max,
            do_sample=False,
            eos_token_id=IM_END,
            pad_token_id=0,
        )
        replies.append(tokenizer.decode(out[0, len(ids) :].tolist(), skip_special_tokens=False))
    return replies


def addition_accuracy(
    model: NemotronHForCausalLM,
    tokenizer: Tokenizer,
    renderer: jinja2.Template,
    think: bool,
    n: int,
) -> float:
    """Share of `n` held-out additions answered right."""
    rng = random.Random(1)
    pairs = [addition_pair(rng, held_out=True) for _ in range(n)]
    prompts = [
        renderer.render(
            messages=[{"role": "user", "content": f"What is {a} + {b}?"}],
            add_generation_prompt=True,
            enable_thinking=think,
        )
        for a, b in pairs
    ]
    model.eval()
    replies = greedy(model, tokenizer, prompts, 60 if think else 12)
    model.train()
    answers = [reply.split("</think>")[-1].replace("<|im_end|>", "").strip() for reply in replies]
    return sum(answer == str(a + b) for answer, (a, b) in zip(answers, pairs, strict=True)) / n


def published_tensors(module: torch.nn.Module, ours: str, theirs: str) -> dict[str, torch.Tensor]:
    """A module's tensors as NVIDIA publishes them: BF16, one entry an expert, another prefix."""
    tensors = {}
    for name, tensor in module.state_dict().items():
        name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
        if ".mixer.experts." in name:  # stacked in transformers
            prefix, kind = name.split(".experts.")
            for i, expert in enumerate(tensor):
                key = f"{prefix}.experts.{i}.{kind}.weight"
                tensors[key] = expert.to(torch.bfloat16).contiguous()
        else:
            tensors[name] = tensor.to(torch.bfloat16).contiguous()
    return tensors


def save(model: NemotronHForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the source model as NVIDIA publishes Nano: BF16 safetensors, `backbone.` names."""
    tensors = published_tensors(model, "model.", "backbone.")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        **MODEL_CONFIG,
        "num_hidden_layers": len(PATTERN),
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "use_conv_bias": True,
        "use_bias": False,
        "mlp_bias": False,
        "attention_bias": False,
        "mamba_proj_bias": False,
        "residual_in_fp32": False,
        "time_step_min": 0.0,
        "mamba_ssm_cache_dtype": "float32",
        "torch_dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = {
        "bos_token_id": 1,
        "eos_token_id": [2, 11],
        "pad_token_id": 0,
        "do_sample": False,
    }
    (out / "generation_config.json").write_text(
        json.dumps(generation, indent=2) + "\n", encoding="utf-8"
    )
    tokenizer_config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": MODEL_CONFIG["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (out / "tokenizer_config.json").write_text(
        json.dumps(tokenizer_config, indent=2) + "\n", encoding="utf-8"
    )
    tokenizer.save(str(out / "tokenizer.json"))


def train_phase(run: Run, phase: Phase, first: int) -> None:
    """Train from step `first` to the end of a phase, saving every 300 steps and at the end."""
    data = batches(run.tokenizer, run.renderer, random.Random(run.seed + 1 + first), phase.mix)
    started, losses = time.monotonic(), []
    last = phase.first + phase.n_steps
    for step in range(first, last):
        for group in run.optimizer.param_groups:
            group["lr"] = phase.learning_rate(step, run.peak_rate)
        losses.append(train_step(run, *next(data)))
        if (step + 1) % 20 == 0:
            mean, seconds = sum(losses) / len(losses), time.monotonic() - started
            print(f"step {step + 1} loss {mean:.4f} {seconds:.0f} s", flush=True)
            losses = []
        if (step + 1) % 300 == 0 or step + 1 == last:
            run.report_and_save(step + 1, n_problems=200 if step + 1 == last else 24)


def train_step(run: Run, ids: torch.Tensor, targets: torch.Tensor) -> float:
    """One step of AdamW on the assistant's tokens; returns the loss."""
    hidden = run.model.model(ids, use_cache=False).last_hidden_state
    said = targets != -100
    loss = F.cross_entropy(run.model.lm_head(hidden[said]), targets[said])
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.balance.update()
    return loss.item()


class Run:
    """Everything a training run holds on to."""

    def __init__(self, out: Path, state: Path, peak_rate: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.out, self.state, self.peak_rate, self.seed = out, state, peak_rate, seed
        self.renderer = chat_renderer(out / "chat_template.jinja")
        self.tokenizer = build_tokenizer(self.renderer, random.Random(seed))
        self.model = build_model()
        self.balance = RouterBalance(self.model)
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": 0.05},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=peak_rate, betas=(0.9, 0.95))

    def resume(self) -> int:
        """Load the saved state, if there is one; returns the next step."""
        if not self.state.exists():
            return 0
        state = torch.load(self.state)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])

    def report_and_save(self, step: int, n_problems: int) -> None:
        """Print the accuracy on held-out additions, save state and source model."""
        right = {
            think: addition_accuracy(self.model, self.tokenizer, self.renderer, think, n_problems)
            for think in (True, False)
        }
        print(
            f"step {step} additions right: thinking {right[True]:.0%}, direct {right[False]:.0%}",
            flush=True,
        )
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**state, "step": step}, self.state)
        save(self.model, self.tokenizer, self.out)


def main() -> None:
    """Train, report, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("nanorun/data/pico"))
    parser.add_argument("--state", type=Path, default=Path("pico-training.pt"), help="to resume")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="at its peak")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    run = Run(args.out, args.state, args.learning_rate, args.seed)
    first = run.resume()
    n_params = sum(p.numel() for p in run.model.parameters())
    print(f"{n_params:,} parameters, {torch.get_num_threads()} threads, step {first}", flush=True)
    for phase in PHASES:
        if first < phase.first + phase.n_steps:
            train_phase(run, phase, max(first, phase.first))


if __name__ == "__main__":
    main()
