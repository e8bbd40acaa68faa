"""modules.prompt_parser: prompts without a grammar but AND, as conds of SDXL's form (dicts of tensors)."""

import re
from collections import namedtuple

import torch

re_AND = re.compile(r"\bAND\b")
ScheduledPromptConditioning = namedtuple("ScheduledPromptConditioning", ["end_at_step", "cond"])


class SdConditioning(list):
    def __init__(self, prompts, is_negative_prompt=False, width=None, height=None, copy_from=None):
        super().__init__(prompts)
        self.is_negative_prompt, self.width, self.height = is_negative_prompt, width, height


class ComposableScheduledPromptConditioning:
    def __init__(self, schedules, weight=1.0):
        self.schedules, self.weight = schedules, weight


class MulticondLearnedConditioning:
    def __init__(self, shape, batch):
        self.shape, self.batch = shape, batch


def get_learned_conditioning_prompt_schedules(prompts, base_steps, hires_steps=None, use_old_scheduling=False):
    return [[[base_steps, prompt]] for prompt in prompts]


def get_learned_conditioning(model, prompts, steps, hires_steps=None, use_old_scheduling=False):
    conds = model.get_learned_conditioning(prompts)
    return [[ScheduledPromptConditioning(steps, {key: rows[number] for key, rows in conds.items()})]
            for number in range(len(prompts))]


def get_multicond_learned_conditioning(model, prompts, steps, hires_steps=None, use_old_scheduling=False):
    batch = []
    for prompt in prompts:
        parts = SdConditioning(re_AND.split(prompt), width=prompts.width, height=prompts.height)
        batch.append([ComposableScheduledPromptConditioning(schedule)
                      for schedule in get_learned_conditioning(model, parts, steps)])
    return MulticondLearnedConditioning((len(prompts),), batch)


def reconstruct_cond_batch(c, current_step):
    conds = [schedules[0].cond for schedules in c]
    return {key: torch.stack([cond[key] for cond in conds]) for key in conds[0]}


def reconstruct_multicond_batch(c, current_step):
    conds_list, schedules = [], []
    for parts in c.batch:
        conds_list.append([(len(schedules) + number, part.weight) for number, part in enumerate(parts)])
        schedules += [part.schedules for part in parts]
    return conds_list, reconstruct_cond_batch(schedules, current_step)
