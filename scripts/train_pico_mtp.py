"""Train a multi-token prediction head for pico, on a CPU: what makes `pico-mtp`.

    python scripts/train_pico_mtp.py --trunk nanorun/data/pico --out nanorun/data/pico_mtp

Needs what `train_pico.py` needs. The head is that of Nemotron 3 Super and 3.5 Lightning: the next
token's embedding and the trunk's output, each normed, are fused by one matrix; an attention and a
MoE layer follow, then a LayerNorm, whose output goes to the trunk's lm_head and back into the head
for the draft after. The trunk stays as it is. The head learns the trunk's own distribution two
tokens ahead, and by being fed its own output, three and four (as in EAGLE-3, arXiv 2503.01840).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import torch
from pico_tasks import EVERYTHING, Conversation, addition_pair, draw, tool_use
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn import functional as F
from train_pico import IM_END, RouterBalance, batches, chat_renderer, published_tensors
from transformers import NemotronHConfig, NemotronHForCausalLM
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHModel

PATTERN = "*E"
HEAD_FILE = "mtp.safetensors"
TRUNK_FILE = "model.safetensors"
N_DRAFT = 3
# A draft is of use only if those before it were right.
DEPTH_WEIGHTS = (1.0, 0.7, 0.5)
N_WARM_UP = 40


class MtpHead(torch.nn.Module):
    """The head; its parameters are named as NVIDIA names them, less `mtp.`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        layers = config | {"hybrid_override_pattern": PATTERN, "num_hidden_layers": len(PATTERN)}
        self.layers = NemotronHModel(NemotronHConfig(**layers)).layers
        n_embd, eps = config["hidden_size"], config["layer_norm_epsilon"]
        attention, moe = self.layers
        attention.enorm = torch.nn.RMSNorm(n_embd, eps)
        attention.hnorm = torch.nn.RMSNorm(n_embd, eps)
        attention.eh_proj = torch.nn.Linear(2 * n_embd, n_embd, bias=False)
        moe.final_layernorm = torch.nn.LayerNorm(n_embd, eps, bias=False)

    def forward(
        self, embedded: torch.Tensor, hidden: torch.Tensor, n_draft: int
    ) -> list[torch.Tensor]:
        """What goes to lm_head, `(n_rows, n_tokens, n_embd)` for each of `n_draft` depths.

        At depth 1 row k sees token k and the trunk's output at k - 1, and foretells token k + 1; at
        depth d it sees the output of depth d - 1 there.

        Args:
            embedded: Embeddings of the tokens, `(n_rows, n_tokens, n_embd)`.
            hidden: The trunk's outputs after its final norm, of the same shape.
            n_draft: Depths.
        """
        attention, moe = self.layers
        outputs, past = [], []
        for _ in range(n_draft):
            before = F.pad(hidden, (0, 0, 1, 0))[:, :-1]
            halves = attention.enorm(embedded), attention.hnorm(before)
            fused = attention.eh_proj(torch.cat(halves, -1))
            normed = attention.norm(fused)
            past.append(_keys_values(attention.mixer, normed))
            hidden = moe.final_layernorm(moe(fused + _attend(attention.mixer, normed, past)))
            outputs.append(hidden)
        return outputs


def _heads(values: torch.Tensor, n_embd_head: int) -> torch.Tensor:
    return values.unflatten(-1, (-1, n_embd_head)).transpose(1, 2)


def _keys_values(mixer: Any, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        _heads(mixer.k_proj(values), mixer.head_dim),
        _heads(mixer.v_proj(values), mixer.head_dim),
    )


def _attend(
    mixer: Any, values: torch.Tensor, past: list[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """Attention of the last depth's rows to what the cache holds when they are drafted.

    The row of depth d at token k was reached from depth 1 at k - d + 1: up to there the cache holds
    rows of depth 1, then one of each depth.
    """
    n, depth = values.shape[1], len(past)
    everywhere = torch.ones(n, n, dtype=torch.bool)
    visible = [everywhere.tril(1 - depth)]
    for other in range(2, depth + 1):
        visible.append(everywhere.tril(other - depth).triu(other - depth))
    found = F.scaled_dot_product_attention(
        _heads(mixer.q_proj(values), mixer.head_dim),
        torch.cat([keys for keys, _ in past], 2),
        torch.cat([values for _, values in past], 2),
        attn_mask=torch.cat(visible, 1),
        enable_gqa=True,
    )
    return mixer.o_proj(found.transpose(1, 2).flatten(2))


def load_trunk(folder: Path) -> NemotronHForCausalLM:
    """A trained pico, frozen."""
    trunk = NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return trunk.eval().requires_grad_(False)


def save_head(head: MtpHead, trunk: Path, out: Path) -> None:
    """Write what `pico-mtp` has beside pico: the head, a config, an index of both files."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = published_tensors(head, "layers.", "mtp.layers.")
    save_file(tensors, out / HEAD_FILE, metadata={"format": "pt"})
    config = json.loads((trunk / "config.json").read_text(encoding="utf-8"))
    config |= {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": PATTERN}
    with safe_open(trunk / TRUNK_FILE, "pt") as file:
        weight_map = dict.fromkeys(sorted(file.keys()), TRUNK_FILE)
    weight_map |= dict.fromkeys(sorted(tensors), HEAD_FILE)
    index = {"metadata": {}, "weight_map": weight_map}
    for name, value in (("config.json", config), ("model.safetensors.index.json", index)):
        (out / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def load_head(folder: Path) -> MtpHead:
    """The head that `save_head` wrote, as float32."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = {
        name.removeprefix("mtp."): tensor.float()
        for name, tensor in load_file(folder / HEAD_FILE).items()
    }
    for kind in ("up_proj", "down_proj"):
        names = [
            f"layers.1.mixer.experts.{i}.{kind}.weight" for i in range(config["n_routed_experts"])
        ]
        tensors[f"layers.1.mixer.experts.{kind}"] = torch.stack([tensors.pop(n) for n in names])
    head = MtpHead(config)
    head.load_state_dict(tensors)
    return head.eval().requires_grad_(False)


@dataclass
class Pico:
    """The frozen trunk and what turns conversations into its tokens."""

    model: NemotronHForCausalLM
    tokenizer: Tokenizer
    renderer: jinja2.Template

    @classmethod
    def load(cls, folder: Path) -> Pico:
        """All of it from the folder of a trained pico."""
        return cls(
            load_trunk(folder),
            Tokenizer.from_file(str(folder / "tokenizer.json")),
            chat_renderer(folder / "chat_template.jinja"),
        )

    @torch.no_grad()
    def states(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings and final outputs of rows of tokens."""
        hidden = self.model.model(ids, use_cache=False).last_hidden_state
        return self.model.model.embeddings(ids), hidden

    def prompt(self, conversation: Conversation) -> list[int]:
        """Tokens up to where the assistant's last turn begins."""
        last = max(i for i, m in enumerate(conversation.messages) if m["role"] == "assistant")
        text = self.renderer.render(
            messages=conversation.messages[:last],
            tools=conversation.tools,
            add_generation_prompt=True,
            enable_thinking=conversation.enable_thinking,
        )
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def train(pico: Pico, head: MtpHead, n_steps: int, peak_rate: float, seed: int) -> None:
    """AdamW on the assistant's tokens of the mix that pico itself ended with."""
    decayed = [p for p in head.parameters() if p.ndim >= 2]
    others = [p for p in head.parameters() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": 0.05},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=peak_rate, betas=(0.9, 0.95))
    balance = RouterBalance(head)
    data = batches(pico.tokenizer, pico.renderer, random.Random(seed), EVERYTHING)
    started = time.monotonic()
    for step in range(n_steps):
        warm_up = min(1.0, (step + 1) / N_WARM_UP)
        rate = warm_up * (0.05 + 0.475 * (1 + math.cos(math.pi * step / n_steps)))
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * rate
        losses = train_step(pico, head, optimizer, *next(data))
        balance.update()
        if (step + 1) % 20 == 0:
            shown = " ".join(f"{loss:.3f}" for loss in losses)
            print(f"step {step + 1} loss {shown} {time.monotonic() - started:.0f} s", flush=True)


def train_step(
    pico: Pico,
    head: MtpHead,
    optimizer: torch.optim.Optimizer,
    ids: torch.Tensor,
    targets: torch.Tensor,
) -> list[float]:
    """One step towards what the trunk says of each token; returns the loss of each depth.

    The loss is the divergence from the trunk's distribution, not the cross entropy of the text: a
    draft is accepted when the trunk agrees, right or wrong.
    """
    embedded, hidden = pico.states(ids)
    said = targets != -100
    expected = pico.model.lm_head(hidden[said]).log_softmax(-1)
    losses = [
        F.kl_div(
            pico.model.lm_head(output[said]).log_softmax(-1),
            expected,
            reduction="batchmean",
            log_target=True,
        )
        for output in head(embedded, hidden, N_DRAFT)
    ]
    optimizer.zero_grad(set_to_none=True)
    sum(w * loss for w, loss in zip(DEPTH_WEIGHTS, losses, strict=True)).backward()
    torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
    optimizer.step()
    return [loss.item() for loss in losses]


@dataclass
class Acceptance:
    """Drafts offered and accepted at each position, over the steps of greedy decoding."""

    n_offered: list[int]
    n_accepted: list[int]

    def __str__(self) -> str:
        shares = zip(self.n_accepted, self.n_offered, strict=True)
        return " ".join(f"{accepted / offered:.1%}" for accepted, offered in shares)


@torch.no_grad()
def acceptance(pico: Pico, head: MtpHead, prompts: list[list[int]]) -> Acceptance:
    """Greedy speculative decoding of replies: how many of the drafts the trunk accepts.

    The reply is the trunk's own, so a draft is accepted when it and those before it in its step are
    what the reply has there; drafts beyond the reply's end are not counted.
    """
    found = Acceptance([0] * N_DRAFT, [0] * N_DRAFT)
    for prompt in prompts:
        ids = pico.model.generate(
            torch.tensor([prompt]),
            max_new_tokens=120,
            do_sample=False,
            eos_token_id=IM_END,
            pad_token_id=0,
        )
        outputs = head(*pico.states(ids), N_DRAFT)
        drafts = [pico.model.lm_head(output)[0].argmax(-1) for output in outputs]
        _follow(ids[0].tolist(), len(prompt), [draft.tolist() for draft in drafts], found)
    return found


def _follow(ids: list[int], at: int, drafts: list[list[int]], found: Acceptance) -> None:
    """Count the steps of one reply, the first of which knows `ids[at]`."""
    while at + 1 < len(ids):
        n_accepted = 0
        for i, draft in enumerate(drafts[: len(ids) - 1 - at]):
            found.n_offered[i] += 1
            if n_accepted == i and draft[at + i] == ids[at + 1 + i]:
                found.n_accepted[i] += 1
                n_accepted += 1
        at += n_accepted + 1


def held_out(n: int) -> dict[str, list[Conversation]]:
    """Conversations drawn anew for the measurement; additions are of the pairs held out."""
    rng = random.Random("held out")
    additions = [addition_pair(rng, held_out=True) for _ in range(2 * n)]
    sums = [
        Conversation(
            [
                {"role": "user", "content": f"What is {a} + {b}?"},
                {"role": "assistant", "content": str(a + b)},
            ],
            enable_thinking=i < n,
        )
        for i, (a, b) in enumerate(additions)
    ]
    return {
        "additions with thinking": sums[:n],
        "additions without": sums[n:],
        "tool calls": [_asked(tool_use(rng, i % 2 == 0)) for i in range(n)],
        "the training mix": [draw(rng, EVERYTHING) for _ in range(n)],
    }


def _asked(conversation: Conversation) -> Conversation:
    """A tool conversation up to the call."""
    return replace(conversation, messages=conversation.messages[:2])


def main() -> None:
    """Train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trunk", type=Path, default=Path("nanorun/data/pico"))
    parser.add_argument("--out", type=Path, default=Path("nanorun/data/pico_mtp"))
    parser.add_argument("--steps", type=int, default=400, help="0: measure what --out holds")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="at its peak")
    parser.add_argument("--n", type=int, default=50, help="replies of each kind to measure on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    pico = Pico.load(args.trunk)
    if args.steps:
        head = MtpHead(json.loads((args.trunk / "config.json").read_text(encoding="utf-8")))
        n_params = sum(p.numel() for p in head.parameters())
        print(f"{n_params:,} parameters, {torch.get_num_threads()} threads", flush=True)
        train(pico, head, args.steps, args.learning_rate, args.seed)
        save_head(head, args.trunk, args.out)
    head = load_head(args.out)
    for kind, conversations in held_out(args.n).items():
        prompts = [pico.prompt(conversation) for conversation in conversations]
        print(f"{kind}: accepted {acceptance(pico, head, prompts)}", flush=True)


if __name__ == "__main__":
    main()
