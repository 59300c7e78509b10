"""Equal requests of a report are computed once, whatever method asks them."""

from usbrec.chat import Message, Ranked, Ranks, Reply, Request, Sampling
from usbrec.crs.agents import Roles, Side
from usbrec.crs.catalogue import Catalogue
from usbrec.extras.once import share_answers


class Server:
    """Answers with the request's words and adapter, and notes what it was asked."""

    def __init__(self):
        self.asked = []

    def generate(self, requests):
        self.asked.append([x.messages[-1].content for x in requests])
        return [Reply(f"{x.adapter}: {x.messages[-1].content}", (), True) for x in requests]

    def choice_logprobs(self, requests, choices):
        self.asked.append([x.messages[-1].content for x in requests])
        return [[float(len(x.messages[-1].content)), *map(float, choices)] for x in requests]


class Model(Server):
    def best_texts(self, requests, texts, k, tokens):
        self.asked.append([x.messages[-1].content for x in requests])
        return [Ranked([(i, -float(i)) for i in range(k)], len(texts)) for _ in requests]


def request(text, adapter="rl", **others):
    return Request((Message("user", text),), adapter=adapter, **others)


def shared(recommender, simulator, external=None):
    roles = Roles(Side(recommender, "rl"), Side(simulator, "simulator"), Catalogue([]), external)
    return share_answers({"simpo": roles, "sft": roles})


def test_equal_requests_are_computed_once_and_all_others_each():
    model = Model()
    roles = shared(model, model)
    llm, other = roles["simpo"].recommender.llm, roles["sft"].simulator.llm
    assert llm is other  # one call for both sides, and for all methods
    texts = [x.text for x in llm.generate([request("a"), request("b"), request("a")])]
    assert texts == ["rl: a", "rl: b", "rl: a"]
    drawn = request("a", sampling=Sampling(temperature=0.5), seed=1)
    again = [request("c"), request("b", "sft"), request("a"), drawn]
    assert [x.text for x in llm.generate(again)] == ["rl: c", "sft: b", "rl: a", "rl: a"]
    assert llm.generate([]) == []
    assert model.asked == [["a", "b"], ["c", "b", "a"]]


def test_calls_and_their_arguments_are_told_apart():
    model = Model()
    llm = shared(model, model)["sft"].recommender.llm
    llm.generate([request("a")])
    assert llm.choice_logprobs([request("a")] * 2, ["0", "1"]) == [[1.0, 0.0, 1.0]] * 2
    assert llm.choice_logprobs([request("a")], ["2"]) == [[1.0, 2.0]]
    assert [x.proven for x in llm.best_texts([request("a")] * 2, ["x", "y"], 2, 9)] == [2, 2]
    assert [x.proven for x in llm.best_texts([request("a")], ["x"], 1, 9)] == [1]
    assert len(llm.best_texts([request("a")], ["x", "y"], 1, 9)[0].texts) == 1
    llm.best_texts([request("a")], ["x", "y"], 1, 8)
    assert model.asked == [["a"]] * 7


def test_a_server_and_another_model_keep_their_own_answers():
    model, judge, server = Model(), Model(), Server()
    roles = shared(model, server, Side(judge))["simpo"]
    assert roles.simulator.llm is server and not isinstance(roles.simulator.llm, Ranks)
    assert isinstance(roles.recommender.llm, Ranks)
    roles.recommender.llm.generate([request("a", None)])
    roles.external.llm.generate([request("a", None)])
    assert model.asked == judge.asked == [["a"]]
    assert roles.recommender.adapter == "rl" and roles.external.adapter is None


def test_answers_are_forgotten_with_the_chunk():
    model = Model()
    for _ in range(2):  # each chunk has roles of its own: a row does not depend on earlier chunks
        shared(model, model)["sft"].recommender.llm.generate([request("a")])
    assert model.asked == [["a"], ["a"]]
