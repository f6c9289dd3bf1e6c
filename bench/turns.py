"""An 8-turn chat: what is read again each turn, and how long the first token takes.

    PEER_PYTHON=... python bench/turns.py MODEL.gguf

Both servers get the same file and messages of the same lengths; replies have 300 tokens of thinking
and 400 of answer. Between turns there is a pause, as between people's messages.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from servers import Reply, Server, nanorun_server, peer_server

N_TURNS, N_THINKING, N_ANSWER = 8, 300, 400
PAUSE_S = 1.5
QUESTION = "What is {a} + {b}? " + "The sky is blue. Water is wet. Birds can fly. " * 7


def chat(server: Server) -> list[Reply]:
    """One conversation; each turn sees all that was said before."""
    messages: list[dict[str, str]] = []
    replies = []
    for i in range(N_TURNS):
        messages.append({"role": "user", "content": QUESTION.format(a=31 * i + 7, b=17 * i + 40)})
        reply = server.ask(messages, n_thinking=N_THINKING, n_answer=N_ANSWER)
        replies.append(reply)
        messages.append(
            {
                "role": "assistant",
                "content": reply.answer,
                "reasoning_content": reply.thinking,
            }
        )
        time.sleep(PAUSE_S)
    return replies


def main() -> None:
    """Run both, print a row a turn and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--n-ctx", type=int, default=16384)
    args = parser.parse_args()
    with nanorun_server(args.model, args.n_ctx, 1) as server:
        ours = chat(server)
    with peer_server(args.model, args.n_ctx, 1) as server:
        theirs = chat(server)
    print("| turn | new prompt tokens | read: nanorun | read: llama.cpp | first token s | |")
    print("|---|---|---|---|---|---|")
    ratios = []
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        ratio = a.first_token_s / b.first_token_s
        ratios += [ratio] if i else []
        print(
            f"| {i + 1} | of {a.n_prompt} / {b.n_prompt} | {a.n_read} | {b.n_read} "
            f"| {a.first_token_s:.3f} / {b.first_token_s:.3f} | {ratio:.2f} |"
        )
    print(f"\nfirst token, median ratio from the second turn on: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
