"""The whole training step, timed beside other ways to do it: ``make gpu-suite PART=stage1|stage2|stage3``."""
