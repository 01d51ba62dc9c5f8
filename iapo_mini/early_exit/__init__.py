"""Early exit: ask a policy for its answer after every prefix of every completion.

* :mod:`~iapo_mini.early_exit.question`: two small classes, for the question and the way to ask it.
* :mod:`~iapo_mini.early_exit.prefixes`: the three ways to ask, and :func:`~prefixes.ask`.
* :mod:`~iapo_mini.early_exit.flat`: the fastest of them, without padded tokens. Its token lists
  are laid out in :mod:`~iapo_mini.early_exit.layout`.
* :mod:`~iapo_mini.early_exit.strides`: asking after some prefixes only.
* :mod:`~iapo_mini.early_exit.reading`: the entropy of the policy's answer.
* :mod:`~iapo_mini.early_exit.stopping`: the same question at inference, to stop thinking early.
"""
