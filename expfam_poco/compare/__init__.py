"""The main job: `expfam-poco compare` trains optimizers side by side on one convex task, counted fairly.

    tasks.py    the task: data, loss, the minimum to machine precision, the gap to it
    table.py    a user's CSV file
    methods.py  names → optimizers and their default hyperparameters
    runner.py   one method on one seed: mini-batches, refreshes, what is counted
    solvers.py  dedicated solvers, scikit-learn's saga and L-BFGS, beside them
    pool.py     many runs over worker processes
    tune.py     the same small grid for every method, on other seeds
    report.py   summary, terminal tables, results.json, results.csv
    plot.py     curves.png
    job.py      all of it in order; what the command line calls

Nothing is imported here, so that `expfam-poco --help` does not wait for torch.
"""
