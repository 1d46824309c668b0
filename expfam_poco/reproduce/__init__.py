"""The papers' figures by one command: `expfam-poco reproduce fig1|fig3|fig4|fig5|fig6|fig7|table1|vsgd-table1`.

A figure is a declaration; everything that runs, resumes, tunes, draws and writes is generic. The other design, a script
for each figure, would have been eight programs that count and resume each in its own way.

    recipe.py    one run: problem, method, steps, correction; and the optimizer of a method
    figure.py    a figure: curves (label, recipe, rates), panels, claims that compare two curves
    figures/     the eight declarations, each at scale "small" and "paper"
    problems.py  what is trained: text, pictures, convex tasks, pretrained models
    data.py      pictures that ship with scikit-learn; loaders.py: the papers' data through torchvision and datasets
    gpt.py, corpus.py, networks.py    models and text
    training.py  the loop: one run from its recipe to a list of points, every gradient counted
    runs.py      many runs: one file each, resumed, over worker processes, with time left
    tune.py      the same rates for every method, on seeds that are never reported
    table.py     claims, tables, results.json and results.csv; plot.py: the picture
    job.py       all of it in order; what the command line calls

Nothing is imported here, so that `expfam-poco --help` does not wait for torch.
"""
