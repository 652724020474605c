from openai import OpenAI
from pensar.serve.service import Service

Q = "What is 2+3?"
def test_it(client: OpenAI, service: Service) -> None:
    r = client.chat.completions.create(model="tiny", messages=[{"role":"user","content":Q}], temperature=0)
    print(r)
    r = client.chat.completions.create(model="tiny", messages=[{"role":"user","content":Q}], temperature=0, stream=True, extra_body={"thinking_budget": 5}, stream_options={"include_usage":True})
    for c in r: print(c)
    r = client.chat.completions.create(model="tiny", messages=[{"role":"user","content":"Weather in Évora?"}], temperature=0, extra_body={"enable_thinking": False}, tools=[{"type":"function","function":{"name":"weather","parameters":{"type": "object", "properties": {"city": {"type": "string"}}}}}])
    print(r)
    r = client.chat.completions.create(model="tiny", messages=[{"role":"user","content":Q + " /no_think"}], temperature=0)
    print(r)
    assert 0
