"""What pico learns: conversations about small sums, remembered keys, tools and itself.

One generator serves training and evaluation. Every conversation is a list of messages in the
OpenAI form; `train_pico.py` renders them with pico's own chat template, so pico sees exactly the
text that nanorun will send it. Addition problems with `is_held_out(a, b)` never enter training.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]

WORDS = (  # noqa: SIM905
    "fox owl bear wolf deer hare toad crow swan goat lamb mole newt crab clam moth wasp frog seal "
    "lynx oak elm ash fir yew ivy rose lily fern moss rock sand lake hill cave reef dune pond tree "
    "leaf star moon rain snow wind fire salt gold iron zinc rope lamp desk door bell drum harp "
    "ring coin book shoe boat cart kite"
).split()
CITIES = (  # noqa: SIM905
    "Paris Rome Oslo Lima Cairo Tokyo Delhi Quito Berlin Madrid Lisbon Vienna Prague Dublin Athens "
    "Seoul Hanoi Accra Nairobi Boston"
).split()
SKIES = ["sunny", "cloudy", "rainy", "windy", "foggy", "snowy"]
FILLERS = [
    "The sky is blue.",
    "Water is wet.",
    "The sun is warm.",
    "Birds can fly.",
    "Fish can swim.",
    "Trees are tall.",
    "Night is dark.",
    "Snow is cold.",
]
FILLER_WORDS = ["the", "a", "is", "of", "why", "how", "write", "tell me"]
SYSTEMS = [
    "You are pico.",
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are pico, a small model.",
]
ABOUT = (
    "I am pico, a very small model. I can add and subtract numbers, remember keys, and call tools."
)
SMALL_TALK = [
    (["Hi", "Hello", "Hey", "hi", "hello", "Hi!", "Hello!", "hey there", "Good morning"],
     "Hello! Give me a sum, like 47 + 86."),
    (["Who are you?", "What are you?", "What is your name?", "who are you", "Introduce yourself."],
     ABOUT),
    (["What can you do?", "Help", "help", "How can you help me?", "what can you do"],
     "I can add and subtract numbers, remember keys, and call tools. Try: What is 47 + 86?"),
    (["Thanks", "Thank you", "thanks!", "Thank you!", "Great, thanks."], "You are welcome!"),
    (["Bye", "Goodbye", "bye", "See you"], "Goodbye!"),
    (["How are you?", "how are you"], "I am well, thank you. Give me a sum!"),
    (["Do you think?", "How do you think?", "How do you add?"],
     "I add digit by digit, from the right, and carry. Thinking makes me right more often."),
]  # fmt: skip
CALCULATOR = {
    "name": "calculator",
    "description": "Evaluate an arithmetic expression.",
    "parameters": {
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "The expression."}},
        "required": ["expression"],
    },
}
WEATHER = {
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "The city."}},
        "required": ["city"],
    },
}


@dataclass
class Conversation:
    """Messages of one training example; the assistant's last turns carry the loss."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    enable_thinking: bool = True


def is_held_out(a: int, b: int) -> bool:
    """Whether `a + b` is kept for evaluation: one pair in eleven, by a fixed rule."""
    return (7919 * a + b) % 11 == 0


def _number(rng: random.Random, max_digits: int = 4) -> int:
    """A number with a uniformly drawn count of digits, so that short ones are not rare."""
    n_digits = rng.randint(1, max_digits)
    return rng.randint(0 if n_digits == 1 else 10 ** (n_digits - 1), 10**n_digits - 1)


def addition_scratchpad(a: int, b: int) -> str:
    """Column addition from the right: `7+6+0=13, 4+8+1=13`, the last term being the carry."""
    left, right = str(a)[::-1], str(b)[::-1]
    carry, steps = 0, []
    for i in range(max(len(left), len(right))):
        x = int(left[i]) if i < len(left) else 0
        y = int(right[i]) if i < len(right) else 0
        total = x + y + carry
        steps.append(f"{x}+{y}+{carry}={total}")
        carry = total // 10
    return ", ".join(steps)


def subtraction_scratchpad(a: int, b: int) -> str:
    """Column subtraction of `b <= a` from the right; a borrowed ten shows as `13-8-0=5`."""
    left, right = str(a)[::-1], str(b)[::-1]
    borrow, steps = 0, []
    for i in range(len(left)):
        x, y = int(left[i]), int(right[i]) if i < len(right) else 0
        lent = 1 if x - y - borrow < 0 else 0
        steps.append(f"{x + 10 * lent}-{y}-{borrow}={x + 10 * lent - y - borrow}")
        borrow = lent
    return ", ".join(steps)


def addition_pair(rng: random.Random, held_out: bool, max_digits: int = 4) -> tuple[int, int]:
    """Two addends, drawn until they are on the wanted side of `is_held_out`."""
    while True:
        a, b = _number(rng, max_digits), _number(rng, max_digits)
        if is_held_out(a, b) == held_out:
            return a, b


ADDITION_FORMS = [
    "What is {a} + {b}?", "{a} + {b}", "{a}+{b}", "{a} + {b} = ?", "Add {a} and {b}.",
    "what is {a}+{b}?", "How much is {a} + {b}?", "What is {a} plus {b}?",
]  # fmt: skip
SUBTRACTION_FORMS = ["What is {a} - {b}?", "{a} - {b}", "{a}-{b}", "{a} - {b} = ?"]


def _turn(question: str, thinking: str, answer: str, think: bool) -> list[Message]:
    reply: Message = {"role": "assistant", "content": answer}
    if think:
        reply["reasoning_content"] = thinking
    return [{"role": "user", "content": question}, reply]


def addition(rng: random.Random, think: bool) -> list[Message]:
    """One addition question and its answer."""
    a, b = addition_pair(rng, held_out=False)
    question = rng.choice(ADDITION_FORMS).format(a=a, b=b)
    return _turn(question, addition_scratchpad(a, b), str(a + b), think)


def subtraction(rng: random.Random, think: bool) -> list[Message]:
    """One subtraction question (never below zero) and its answer."""
    b, a = sorted((_number(rng), _number(rng)))
    question = rng.choice(SUBTRACTION_FORMS).format(a=a, b=b)
    return _turn(question, subtraction_scratchpad(a, b), str(a - b), think)


def recall(
    rng: random.Random, think: bool, max_keys: int = 24, max_questions: int = 1
) -> list[Message]:
    """Keys to remember, plain or among filler sentences, and questions about some of them."""
    names = rng.sample(WORDS, rng.randint(2, max_keys))
    keys = {name: rng.randint(1000, 9999) for name in names}
    if rng.random() < 0.5:
        notes = "Remember: " + ", ".join(f"{name}={key}" for name, key in keys.items()) + "."
    else:
        sentences = [f"The key of {name} is {key}." for name, key in list(keys.items())[:12]]
        sentences += rng.choices(FILLERS, k=rng.randint(0, 14))
        rng.shuffle(sentences)
        notes = " ".join(sentences)
        names = names[:12]
    asked = [rng.choice(names)]
    if max_questions > 1:
        asked += rng.choices(names, k=rng.randint(0, max_questions - 1))
    turns: list[Message] = []
    for name in asked:
        turns += _turn(
            f"What is the key of {name}?", f"{name}={keys[name]}", str(keys[name]), think
        )
    if rng.random() < 0.35:
        return _turn(notes, "keys to remember", "OK.", think) + turns
    turns[0]["content"] = f"{notes} {turns[0]['content']}"
    return turns


def repeat(rng: random.Random, think: bool) -> list[Message]:
    """Words and numbers to say again: the plainest copying."""
    words = [
        rng.choice(WORDS) if rng.random() < 0.5 else str(_number(rng))
        for _ in range(rng.randint(1, 8))
    ]
    text = " ".join(words)
    return _turn(f"Repeat: {text}", "repeat it", text, think)


def small_talk(rng: random.Random, think: bool) -> list[Message]:
    """A greeting or a question about pico; unknown words get a plain 'I do not know'."""
    if rng.random() < 0.3:
        words = rng.choices([*WORDS, *FILLER_WORDS], k=rng.randint(2, 7))
        question = " ".join(words).capitalize() + rng.choice(["?", ".", ""])
        return _turn(question, "not a sum, not a key", f"I do not know that. {ABOUT}", think)
    questions, answer = rng.choice(SMALL_TALK)
    return _turn(rng.choice(questions), "small talk", answer, think)


def json_reply(rng: random.Random, think: bool) -> list[Message]:
    """A request for a small JSON object."""
    name, age = rng.choice(WORDS), rng.randint(1, 99)
    question = f"Reply in JSON: name {name}, age {age}"
    return _turn(question, "JSON with name and age", f'{{"name": "{name}", "age": {age}}}', think)


def tool_use(rng: random.Random, think: bool, max_turns: int = 1) -> Conversation:
    """Questions that need one tool: the call, the tool's reply, the answer."""
    conversation = _tool_turn(rng, think)
    for _ in range(rng.randint(0, max_turns - 1) if max_turns > 1 else 0):
        more = _tool_turn(rng, think)
        if all(tool in conversation.tools for tool in more.tools):
            conversation.messages += more.messages
    return conversation


def _tool_turn(rng: random.Random, think: bool) -> Conversation:
    if rng.random() < 0.75:
        a, b, op = _number(rng), _number(rng), rng.choice("**/")
        question = rng.choice(
            ["What is {a} {op} {b}?", "{a} {op} {b}", "{a}{op}{b}", "Compute {a} {op} {b}."]
        )
        question = question.format(a=a, op=op, b=b)
        name, arguments = "calculator", {"expression": f"{a} {op} {b}"}
        result = str(a * b) if op == "*" else (f"{a / b:.2f}" if b else "error")
        plan, answer = "use the calculator", result
    else:
        city = rng.choice(CITIES)
        question = rng.choice(["What is the weather in {c}?", "Weather in {c}?"]).format(c=city)
        name, arguments = "get_weather", {"city": city}
        result = f"{rng.choice(SKIES)}, {rng.randint(-9, 35)}"
        plan, answer = "use get_weather", f"The weather in {city} is {result}."
    tools = rng.choice([[CALCULATOR], [WEATHER], [CALCULATOR, WEATHER], [WEATHER, CALCULATOR]])
    wanted = CALCULATOR if name == "calculator" else WEATHER
    if wanted not in tools:
        tools = [wanted]
    call: Message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }
    final: Message = {"role": "assistant", "content": answer}
    if think:
        call["reasoning_content"] = plan
        final["reasoning_content"] = f"the result is {result}"
    messages = [
        {"role": "user", "content": question},
        call,
        {"role": "tool", "content": result},
        final,
    ]
    return Conversation(messages, [{"type": "function", "function": tool} for tool in tools], think)


@dataclass(frozen=True)
class Mix:
    """How often each task is drawn."""

    weights: tuple[int, int, int, int, int, int]
    """Addition, subtraction, recall, small talk, JSON, repeating."""
    tool_rows: float
    """Share of the training rows that begin with a tool conversation."""
    max_keys: int
    """Most keys in one recall question."""
    think: float = 0.6
    """Share of conversations with thinking."""
    max_questions: int = 1
    """Most questions about the keys of one recall conversation."""
    tool_turns: int = 1
    """Most questions in one tool conversation."""


BROAD = Mix(weights=(58, 13, 14, 11, 4, 0), tool_rows=0.16, max_keys=24)
ARITHMETIC = Mix(weights=(74, 12, 7, 5, 2, 0), tool_rows=0.08, max_keys=12, think=0.7)
BALANCED = Mix(weights=(60, 12, 14, 10, 4, 0), tool_rows=0.14, max_keys=20, think=0.65)
# Copying is learned when much of the loss lies on it: few keys, many questions, little thinking.
COPYING = Mix(
    weights=(20, 5, 35, 4, 18, 18), tool_rows=0.5, max_keys=6, think=0.25,
    max_questions=5, tool_turns=3,
)  # fmt: skip
EVERYTHING = Mix(
    weights=(46, 12, 24, 8, 8, 2), tool_rows=0.3, max_keys=24, think=0.6,
    max_questions=3, tool_turns=2,
)  # fmt: skip


def draw(rng: random.Random, mix: Mix = BROAD) -> Conversation:
    """Draw one conversation of a training mix (without tools)."""
    think = rng.random() < mix.think
    messages: list[Message] = []
    if rng.random() < 0.15:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    n_turns = rng.choices([1, 2, 3], weights=[6, 2, 1])[0]
    tasks = [addition, subtraction, recall, small_talk, json_reply, repeat]
    for _ in range(n_turns):
        task = rng.choices(tasks, weights=mix.weights)[0]
        if task is recall:
            messages += recall(rng, think, mix.max_keys, mix.max_questions)
        else:
            messages += task(rng, think)
    return Conversation(messages, enable_thinking=think)
