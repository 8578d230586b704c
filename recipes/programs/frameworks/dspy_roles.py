"""Two modules of a DSPy program. Texts go in and out as they are: a small model cannot keep to
DSPy's own markers."""

import json
import os
import sys
from typing import Any

import dspy


class Plain(dspy.Adapter):
    """The instructions as the system message, the inputs as they are, the whole reply as the
    output."""

    def format(
        self, signature: Any, demos: list[dict[str, Any]], inputs: dict[str, Any]
    ) -> list[dict[str, Any]]:
        told = "+".join(str(inputs[name]) for name in signature.input_fields)
        return [
            {"role": "system", "content": signature.instructions},
            {"role": "user", "content": told},
        ]

    def parse(self, signature: Any, completion: str) -> dict[str, Any]:
        return dict.fromkeys(signature.output_fields, completion)


def model(role: str) -> dspy.LM:
    where = {"api_base": os.environ["OPENAI_BASE_URL"], "api_key": os.environ["OPENAI_API_KEY"]}
    return dspy.LM(f"openai/{role}", cache=False, **where)


class TwoRoles(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.Predict(dspy.Signature("prompt -> sum", "first"))
        self.last = dspy.Predict(dspy.Signature("sum, third -> answer", "last"))
        self.first.lm, self.last.lm = model("first"), model("last")

    def forward(self, prompt: str) -> dspy.Prediction:
        return self.last(sum=self.first(prompt=prompt).sum, third=prompt.split("+")[-1])


dspy.configure(adapter=Plain())
print(TwoRoles()(prompt=json.load(sys.stdin)["prompt"]).answer)
