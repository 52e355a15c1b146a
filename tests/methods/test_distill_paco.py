"""PaCo against an explicit loop in float64, and its queue and key encoder."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F

import pyvitfast as vf
from pyvitfast.distill import SAM, CosineClassifier, PaCo, PaCoConfig, PaCoLoss

COUNTS = [60, 25, 9, 4]


def loop(logits, query, others, labels, of, c):
    """The formula, one candidate at a time."""
    total = 0.0
    prior = [n / sum(COUNTS) for n in COUNTS]
    for i in range(len(labels)):
        centres = [logits[i, k] + math.log(prior[k]) for k in range(len(COUNTS))]
        features = [(query[j], int(labels[j])) for j in range(len(labels)) if j != i]
        features += [(others[j], int(of[j])) for j in range(len(of)) if of[j] >= 0]
        products = [(query[i] * f).sum() / c.temperature for f, _ in features]
        denominator = sum(x.exp() for x in centres) + c.gamma * sum(x.exp() for x in products)
        y = int(labels[i])
        positives = [x for x, (_, k) in zip(products, features) if k == y]
        value = c.beta * (centres[y] - denominator.log())
        value = value + c.alpha * sum(x - denominator.log() for x in positives)
        total = total - value / (c.beta + c.alpha * len(positives))
    return total / len(labels)


@pytest.mark.parametrize(
    "settings",
    [{}, {"alpha": 0.3, "beta": 0.7, "gamma": 0.4, "temperature": 0.2}, {"gamma": 0.0}, {"alpha": 0.0}],
)
def test_formula(settings):
    c = PaCoConfig(**settings)
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    query = F.normalize(torch.randn(5, 3, dtype=torch.float64)).requires_grad_()
    others = F.normalize(torch.randn(9, 3, dtype=torch.float64))
    labels, of = torch.tensor([0, 1, 1, 3, 2]), torch.tensor([0, 1, 1, 3, 2, 0, -1, 1, -1])
    found = PaCoLoss(COUNTS, c)(logits, query, others, labels, of)
    expected = loop(logits, query, others, labels, of, c)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for one, other in zip(
        torch.autograd.grad(found, (logits, query), materialize_grads=True),
        torch.autograd.grad(expected, (logits, query), materialize_grads=True),
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def test_without_features_it_is_balanced_softmax():
    logits, labels = torch.randn(6, 4, dtype=torch.float64), torch.randint(4, (6,))
    no_features, no_labels = torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, dtype=torch.long)
    query = F.normalize(torch.randn(6, 3, dtype=torch.float64))
    loss = PaCoLoss(COUNTS, PaCoConfig(alpha=0.0, gamma=0.0))
    prior = (torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)).log()
    expected = F.cross_entropy(logits + prior, labels)
    torch.testing.assert_close(
        loss(logits, query, no_features, labels, no_labels), expected, rtol=1e-12, atol=0
    )


def small(**settings):
    torch.manual_seed(0)
    encoder = timm.create_model("resnet20_cifar", in_chans=1, num_classes=4)
    return PaCo(encoder, COUNTS, **{"queue": 10, "dim": 5, **settings}).train()


def views(count=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    one, other = (torch.randn(count, 1, 8, 8, generator=g) for _ in range(2))
    return one, other, torch.randint(4, (count,), generator=g)


def test_loss_of_a_batch():
    paco = small()
    paco(*views(seed=1))
    paco.advance()
    one, other, labels = views()
    before = copy.deepcopy(paco)
    found = paco(one, other, labels)
    pooled = before.encoder.forward_features(one).mean((2, 3))
    query = F.normalize(before.mlp(pooled))
    keys = F.normalize(before.key_mlp(before.key_encoder.forward_features(other).mean((2, 3))))
    others = torch.cat((keys, before.queue)).double()
    of = torch.cat((labels, before.queue_labels))
    expected = loop(before.encoder.fc(pooled).double(), query.double(), others, labels, of, paco.config)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    found.backward()
    assert all(p.grad is not None for p in (*paco.encoder.parameters(), *paco.mlp.parameters()))
    assert all(p.grad is None for p in (*paco.key_encoder.parameters(), *paco.key_mlp.parameters()))


def test_queue_goes_round():
    paco = small()
    assert (paco.queue_labels == -1).all()
    seen = []
    for step in range(4):
        batch = views(seed=step)
        paco(*batch)
        keys = paco._latest[0]
        paco.advance()
        seen += list(zip(keys, batch[2].tolist()))
        # The latest ten, each at its number modulo ten.
        for number in range(max(0, len(seen) - 10), len(seen)):
            feature, label = seen[number]
            assert torch.equal(paco.queue[number % 10], feature)
            assert int(paco.queue_labels[number % 10]) == label
    torch.testing.assert_close(paco.queue.norm(dim=1), torch.ones(10))
    with pytest.raises(RuntimeError, match="advance\\(\\) must come after a forward pass"):
        paco.advance()


def test_key_encoder_follows():
    paco = small(momentum=0.75)
    start = copy.deepcopy(paco.key_encoder.state_dict())
    optimizer = torch.optim.SGD((p for p in paco.parameters() if p.requires_grad), 0.1)
    paco(*views()).backward()
    optimizer.step()
    paco.advance()
    ahead = dict(paco.encoder.named_parameters())
    for name, p in paco.key_encoder.named_parameters():
        torch.testing.assert_close(p, 0.75 * start[name] + 0.25 * ahead[name].detach())
    assert not any("fc" in name for name, _ in paco.key_encoder.named_parameters())


def test_two_passes_of_sam_are_one_batch_of_the_queue():
    paco = small()
    sam = SAM(torch.optim.SGD([p for p in paco.parameters() if p.requires_grad], 0.1), 0.1)

    def closure():
        sam.zero_grad()
        loss = paco(*views())
        loss.backward()
        return loss

    sam.step(closure)
    paco.advance()
    assert int((paco.queue_labels >= 0).sum()) == 4


def test_teacher_is_an_ordinary_model(tmp_path):
    paco = small()
    teacher = paco.teacher()
    assert not teacher.training and paco.encoder.training
    vf.save(teacher, tmp_path / "teacher.safetensors")
    again = vf.load(tmp_path / "teacher.safetensors")
    images = views()[0]
    pooled = teacher.forward_head(teacher.forward_features(images), pre_logits=True)
    expected = F.linear(pooled, paco.encoder.fc.weight, paco.encoder.fc.bias)
    torch.testing.assert_close(again(images), expected)


def test_state_round_trip():
    paco = small()
    paco(*views())
    paco.advance()
    again = small()
    again.load_state_dict(paco.state_dict())
    assert torch.equal(again(*views(seed=2)), paco(*views(seed=2)))
    paco.advance(), again.advance()
    assert torch.equal(again.queue, paco.queue)


def test_bad_settings():
    with pytest.raises(ValueError, match="`temperature` must be finite and above 0, got 0"):
        PaCoConfig(temperature=0)
    with pytest.raises(ValueError, match="unknown key 'size'"):
        PaCoConfig.from_dict({"size": 3})
    assert PaCoConfig.from_dict(PaCoConfig(dim=7).to_dict()) == PaCoConfig(dim=7)
    with pytest.raises(TypeError, match="either `config` or single settings"):
        PaCo(timm.create_model("resnet20_cifar"), [1] * 10, PaCoConfig(), dim=3)
    with pytest.raises(ValueError, match="Linear classifier of 4 classes, got Linear of 10"):
        PaCo(timm.create_model("resnet20_cifar"), COUNTS)
    cosine = timm.create_model("resnet20_cifar", cosine=True)
    assert isinstance(cosine.get_classifier(), CosineClassifier)
    with pytest.raises(ValueError, match="got CosineClassifier of 10"):
        PaCo(cosine, [1] * 10)
    with pytest.raises(ValueError, match="no images of classes 1"):
        PaCoLoss([1, 0])


def test_autocast_does_not_round_the_products():
    logits, labels, of = torch.randn(6, 4), torch.randint(4, (6,)), torch.randint(-1, 4, (9,))
    query, others = F.normalize(torch.randn(6, 8)), F.normalize(torch.randn(9, 8))
    loss = PaCoLoss(COUNTS)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(logits, query, others, labels, of)
    assert torch.equal(found, loss(logits, query, others, labels, of))


def test_an_empty_batch_costs_nothing():
    loss = PaCoLoss([4, 2, 1])
    none, labels = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, dtype=torch.long)
    found = loss(none, torch.zeros(0, 8), torch.zeros(2, 8), labels, torch.tensor([0, 1]))
    found.backward()
    assert (found.item(), none.grad.shape) == (0, (0, 3))
