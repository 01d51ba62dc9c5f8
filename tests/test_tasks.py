"""The prompt of a problem."""

from iapo_mini.chat import render_prompt
from iapo_mini.tasks import Problem, messages


def test_the_prompt_holds_the_question_and_opens_the_assistants_turn(tokenizer):
    problem = Problem("How many legs has a spider?", "8")
    prompt = render_prompt(tokenizer, problem)
    assert problem.question in prompt
    assert prompt.endswith("<|im_start|>assistant\n")
    assert "8" not in prompt
    # The embedded policy's template leaves out the system turn; other templates keep it.
    assert "<answer>" not in prompt
    system, user = messages(problem)
    assert system["role"] == "system" and "<think>" in system["content"]
    assert user == {"role": "user", "content": problem.question}
