"""The main job: a small GPT trained on real text, every optimizer step judged by the oracle."""
