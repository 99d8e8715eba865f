"""A schedule inside a diffusers pipeline: routing thin weights, applying a run, taking it off again."""
