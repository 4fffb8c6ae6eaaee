"""The model that lmms-eval asks: a checkpoint of ours behind its chat interface. Every failure is raised."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from hive_ds.errors import HiveError
from hive_ds.evaluation.checkpoints import load_checkpoint
from hive_ds.evaluation.generation import generate_answers


@dataclass(frozen=True)
class GenerationSettings:
    """What of a task's ``generation_kwargs`` decides about an answer."""

    max_new_tokens: int
    num_beams: int
    stops: tuple[str, ...]

    @classmethod
    def read(cls, values: Mapping[str, Any], task: str) -> GenerationSettings:
        """From a task's values.

        Raises:
            HiveError: no longest answer is given, or the task samples, which would make scores chance.
        """
        if values.get("do_sample") or values.get("temperature"):
            raise HiveError(f"task {task}: samples answers ({dict(values)}); expected greedy ones")
        if "max_new_tokens" not in values:
            raise HiveError(f"task {task}: sets no max_new_tokens; expected a longest answer")
        stops = values.get("until") or []
        return cls(
            int(values["max_new_tokens"]),
            int(values.get("num_beams") or 1),
            (stops,) if isinstance(stops, str) else tuple(stops),
        )

    def cut(self, answer: str) -> str:
        """``answer`` up to the first stop."""
        for stop in self.stops:
            answer = answer.partition(stop)[0]
        return answer.strip()


def this_rank(device: str | None) -> Accelerator:
    """This process among its ranks; they are joined when a launcher has started several."""
    # Without an accelerator, accelerate joins ranks only when it is told to use the CPU.
    return Accelerator(cpu=device == "cpu" or not torch.accelerator.is_available())


class ChatModel(lmms):
    """What every model here shares: its place among the ranks, and no other kind of request than generation."""

    is_simple = False

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.accelerator = this_rank(device)
        self.device = torch.device(device) if device else self.accelerator.device
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    def document(self, request: Instance) -> tuple[str, Mapping[str, Any]]:
        """Name of the task and row of the data set that a request is about; images are decoded."""
        _, _, _, row, task, split = request.args
        return task, self.task_dict[task][split][row]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not what a benchmark here asks for."""
        raise HiveError("hive_ds answers generate_until requests only, not loglikelihood")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not what a benchmark here asks for."""
        raise HiveError("hive_ds answers generate_until requests only, not generate_until_multi_round")


class CheckpointModel(ChatModel):
    """A trained checkpoint, answering in batches.

    ``lmms_eval --model hive_ds --model_args pretrained=FOLDER,dtype=bfloat16`` or `hive_ds.evaluation.benchmarks.run`.
    """

    def __init__(
        self, pretrained: str, batch_size: int | str = 16, device: str | None = None, dtype: str = "float32"
    ) -> None:
        """Load the checkpoint.

        Args:
            pretrained: a model's folder, or a run's.
            batch_size: questions a rank answers together.
            device: ``cpu``, ``cuda:0``, ...; default the one of this rank.
            dtype: of the weights.

        Raises:
            HiveError: no such checkpoint.
        """
        super().__init__(device)
        self.batch_size = int(batch_size)
        self.model, self.processor = load_checkpoint(pretrained, dtype)
        self.model.to(self.device)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers, in the order of the requests; questions of about equal length share a batch.

        Raises:
            RuntimeError: a batch failed; it names the documents.
        """
        answers = [""] * len(requests)
        groups: dict[GenerationSettings, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[GenerationSettings.read(request.args[2], request.args[4])].append(index)
        with tqdm(total=len(requests), desc="Answers", disable=self.rank != 0) as bar:
            for settings, indices in groups.items():
                indices.sort(key=lambda index: len(requests[index].args[0]))
                for start in range(0, len(indices), self.batch_size):
                    batch = indices[start : start + self.batch_size]
                    texts = self._answer([requests[index] for index in batch], settings)
                    for index, text in zip(batch, texts, strict=True):
                        answers[index] = text
                    bar.update(len(batch))
        return answers

    def _answer(self, requests: Sequence[Instance], settings: GenerationSettings) -> list[str]:
        try:
            prompts, images = [], []
            for request in requests:
                prompt, pictures = self._prompt(request)
                prompts.append(prompt)
                images += pictures
            answers = generate_answers(
                self.model,
                self.processor,
                prompts,
                images,
                template="chat",
                max_new_tokens=settings.max_new_tokens,
                num_beams=settings.num_beams,
            )
        except Exception as error:
            documents = ", ".join(f"{request.args[4]} {request.args[3]}" for request in requests)
            raise RuntimeError(f"no answers to documents {documents}: {error}") from error
        return [settings.cut(answer) for answer in answers]

    def _prompt(self, request: Instance) -> tuple[str, list[Image.Image]]:
        """The question in the model's chat template, and its images."""
        to_messages: Callable[[Any], list[dict[str, Any]]] = request.args[1]
        _, document = self.document(request)
        images, conversation = [], []
        for message in to_messages(document):
            parts = []
            for part in message["content"]:
                if part["type"] == "image":
                    images.append(part["url"])
                    parts.append({"type": "image"})
                else:
                    parts.append({"type": "text", "text": part["text"]})
            conversation.append({"role": message["role"], "content": parts})
        return self.processor.apply_chat_template(conversation, add_generation_prompt=True), images
