"""How a policy is asked for its answer after every prefix of every completion.

* :mod:`~iapo_mini.early_exit.question`: what is asked, and how: two small values.
* :mod:`~iapo_mini.early_exit.prefixes`: the three ways to ask, and :func:`~prefixes.ask`.
* :mod:`~iapo_mini.early_exit.flat`: the fastest of them, without a padded token; its token lists
  are laid out in :mod:`~iapo_mini.early_exit.layout`.
* :mod:`~iapo_mini.early_exit.strides`: asking after some prefixes only.
* :mod:`~iapo_mini.early_exit.reading`: the entropy of what the policy would answer.
"""
