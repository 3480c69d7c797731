"""The values of every knob of an ablation, for tests on a CPU and on a GPU."""

from __future__ import annotations

# Every value of every knob but the defaults; of a free value, one that makes a difference.
KNOBS = {
    "lora_targets": ("k", "q v proj", "q k v proj lin1 lin2", "q v decoder"),
    "lora_blocks": ("first_half", "last_half", "every_2", "1 3"),
    "lora_kind": ("rslora", "dora"),
    "lora_alpha": ("8",),
    "lora_dropout": ("0.3",),
    "train": ("decoder", "lora", "all"),
    "loss": ("focal+dice", "ce", "dice", "ce+dice+boundary"),
    "class_weights": ("inverse",),
    "schedule": ("cosine", "constant"),
    "optimizer": ("adamw",),
    "augment": ("none", "samed+intensity", "anatomical"),
    "input_slices": ("3",),
    "decoder_depth": ("4", "6"),
    "logits": ("2",),
    "ema": ("0.5",),
    "prompt_prob": ("0.4",),
}
EACH = [(name, value) for name, values in KNOBS.items() for value in values]
# Nearly all values of all knobs in few runs, for what takes long.
TOGETHER = {
    "places": "--lora_targets q k v proj lin1 lin2 --lora_blocks last_half --lora_dropout 0.3 "
    "--augment samed+intensity --schedule cosine --ema 0.5",
    "prompts": "--prompt_prob 0.4 --lora_dropout 0.3 --lora_targets q v decoder",
    "dora": "--lora_kind dora --lora_alpha 8 --lora_targets q v decoder --decoder_depth 4 "
    "--loss focal+dice --class_weights inverse --augment anatomical",
    "2.5-D": "--input_slices 3 --logits 2 --loss ce+dice+boundary --lora_kind rslora "
    "--lora_blocks every_2 --augment none",
    # With SGD: AdamW of two processes is in test_ranks.py, which says why it needs another bound.
    "everything": "--train all --loss dice --schedule constant --logits 2",
    "decoder": "--train decoder --loss ce --decoder_depth 6 --ema 0.9 --augment samed+intensity",
    "lora": "--train lora --lora_dropout 0.2 --lora_kind dora --lora_targets k",
}
# Every value once, for resuming and rebuilding. A network that is rebuilt without one of the values
# of a group gives other numbers: no value hides another, as --train decoder would hide updates.
GROUPS = {
    "k": "--lora_targets k --lora_blocks first_half --lora_kind rslora --lora_alpha 8 "
    "--lora_dropout 0.3 --loss focal+dice --schedule cosine --augment none",
    "proj": "--lora_targets q v proj --lora_blocks last_half --lora_kind dora --loss ce "
    "--class_weights inverse --optimizer adamw --augment samed+intensity",
    "MLP": "--lora_targets q k v proj lin1 lin2 --lora_blocks every_2 --train lora --loss dice "
    "--schedule constant --augment anatomical",
    "decoder": "--lora_targets q v decoder --lora_blocks 1 3 --loss ce+dice+boundary --logits 2 "
    "--input_slices 3",
    "deeper": "--train decoder --decoder_depth 4",
    "everything": "--train all --decoder_depth 6",
    "ema": "--ema 0.5",
    "prompts": "--prompt_prob 0.4",
}
