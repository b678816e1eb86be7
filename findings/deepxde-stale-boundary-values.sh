#!/usr/bin/env bash
# deepxde 1.15.0, PyTorch: PDEPointResampler(bc_points=True) makes a DirichletBC compare new points with values of old
# ones. Training then fits wrong boundary values, silently; OperatorBC with the same condition trains.
#
# Seen with torch 2.13.0, Python 3.11, on Linux x86-64 without a GPU, Laplace's equation on the square, solution
# x^2 - y^2, 2000 steps of Adam, points drawn anew every 20 steps (the numbers differ from run to run):
#
#     deepxde 1.15.0
#     seed 0, DirichletBC: values of other points in 49% of the steps; boundary loss at the end 2e-01, error 7e-01
#     seed 0, OperatorBC: boundary loss at the end 7e-07, error 1e-03
#     seed 1, DirichletBC: values of other points in 95% of the steps; boundary loss at the end 4e-01, error 1e+00
#     seed 1, OperatorBC: boundary loss at the end 4e-03, error 1e-01
#     seed 2, DirichletBC: values of other points in 59% of the steps; boundary loss at the end 5e-01, error 1e+00
#     seed 2, OperatorBC: boundary loss at the end 3e-06, error 2e-03
#
# The values are cached by id(points) and never dropped. The resampler frees the old array, a later array of points gets
# its address, and the cache answers with the values of the old one. By its code, the normals of a NeumannBC are cached
# alike. It does not show where the values are constant or the boundary points stay: `bc_points=False`, the default, or
# `train_distribution="Hammersley"`. The same cache is known to freeze trained conditions: lululxvi/deepxde,
# issue 2074.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.3.5 deepxde==1.15.0
cat > "$folder/check.py" <<'PYTHON'
import deepxde as dde
import numpy as np

print("deepxde", dde.__version__)


def solution(x):
    return x[:, 0:1] ** 2 - x[:, 1:2] ** 2


def equation(x, u):
    return dde.grad.hessian(u, x, i=0, j=0) + dde.grad.hessian(u, x, i=1, j=1)


class CountStale(dde.callbacks.Callback):
    """The steps in which the values that the condition uses aren't those of its points."""

    stale = steps = 0

    def on_epoch_begin(self):
        data = self.model.data
        points = data.train_x[: data.num_bcs[0]]
        values = data.bcs[0].func(data.train_x, 0, len(points), None).numpy()
        self.stale += np.abs(values - solution(points)).max() > 1e-5
        self.steps += 1


def train(seed, condition, callbacks):
    dde.config.set_random_seed(seed)
    square = dde.geometry.Rectangle([0, 0], [1, 1])
    data = dde.data.PDE(
        square, equation, condition(square), num_domain=100, num_boundary=40, train_distribution="pseudo"
    )
    model = dde.Model(data, dde.nn.FNN([2, 20, 20, 1], "tanh", "Glorot normal"))
    model.compile("adam", lr=5e-3, verbose=0)
    resampler = dde.callbacks.PDEPointResampler(period=20, bc_points=True)
    model.train(iterations=2000, callbacks=[resampler, *callbacks], display_every=10**6, verbose=0)
    boundary_loss = model.outputs_losses_train(data.train_x, None, None)[1][1].item()
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 50)] * 2), -1).reshape(-1, 2)
    error = np.linalg.norm(model.predict(grid) - solution(grid)) / np.linalg.norm(solution(grid))
    return f"boundary loss at the end {boundary_loss:.0e}, error {error:.0e}", error


def dirichlet(square):
    return dde.icbc.DirichletBC(square, solution, lambda x, on_boundary: on_boundary)


def operator(square):
    return dde.icbc.OperatorBC(square, lambda x, u, _: u - solution(x), lambda x, on_boundary: on_boundary)


for seed in range(3):
    counter = CountStale()
    text, cached_error = train(seed, dirichlet, [counter])
    share = counter.stale / counter.steps
    print(f"seed {seed}, DirichletBC: values of other points in {share:.0%} of the steps; {text}", flush=True)
    text, error = train(seed, operator, [])
    print(f"seed {seed}, OperatorBC: {text}", flush=True)
    assert share > 0.25 and cached_error > 3 * error
PYTHON
DDE_BACKEND=pytorch "$folder/venv/bin/python" -W ignore "$folder/check.py" 2>/dev/null
echo "as described"
