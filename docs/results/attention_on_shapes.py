"""On which shape lies the attention that predicts an answer: the asked-for one, another? After `make quickstart`."""

import torch

from hive_ds.chat.answer_maps import answer_maps
from hive_ds.chat.conversation import AnswerSettings, Conversation
from hive_ds.chat.loading import load_chat_model
from hive_ds.data.images import decode_image
from hive_ds.data.scenes_samples import question_samples

chat, rows = load_chat_model("runs/quickstart"), []
for sample in question_samples(0, "questions", 1200, 64):
    items, kind = sample.meta["scene"]["items"], sample.meta["kind"]
    if kind not in ("colour", "shape") or len(items) < 2:
        continue
    question = sample.turns[0].content.removeprefix("<image>")
    asked = [i for i in items if i["shape" if kind == "colour" else "colour"] in question]
    if len(asked) != 1:
        continue
    conversation = Conversation(chat, AnswerSettings(max_new_tokens=8))
    conversation.show(decode_image(sample.images[0]))
    answer = conversation.ask(question)
    maps = answer_maps(chat, answer)
    first = maps.rows[min(1, len(maps.rows) - 1)]
    for layer in maps.maps.layers:
        grid = first.on_patches(layer, 0)
        cells = (
            (grid / grid.sum()).unflatten(0, (4, 2)).unflatten(2, (4, 2)).sum((1, 3))
        )  # 4 x 4 cells of 2 x 2 patches
        on = [float(cells[i["row"], i["column"]]) for i in items]
        here = items.index(asked[0])
        others = (sum(on) - on[here]) / (len(on) - 1)
        rows.append((layer.layer, float(grid.sum()), on[here], others, answer.text == sample.turns[1].content))
table = torch.tensor(rows, dtype=torch.float64)
for number in table[:, 0].unique():
    of = table[table[:, 0] == number]
    right, difference = of[of[:, 4] == 1], of[:, 2] - of[:, 3]
    print(
        f"layer {number:.0f}: {len(of)} questions, {len(right)} right; on the picture {of[:, 1].mean():.0%}, of it on "
        f"the asked shape's cell {of[:, 2].mean():.1%} ({right[:, 2].mean():.1%} when right), on another shape's "
        f"{of[:, 3].mean():.1%}; difference {difference.mean():.1%} +- {difference.std() / len(of) ** 0.5:.1%}"
    )
