"""The figures and tables, each a declaration at two scales; page numbers and sections are those of the papers.

PC is *SVRG and Beyond via Posterior Correction*, VSGD-G *Variational Stochastic Gradient Descent for Deep Neural
Networks*. Where App. D of PC leaves something open, a comment says what was chosen.
"""

from expfam_poco.reproduce.figure import Figure
from expfam_poco.reproduce.figures import convex, finetuning, pictures, text, vsgd

FIGURES: dict[str, Figure] = {
    figure.name: figure
    for figure in (
        text.FIG1,
        convex.FIG3,
        pictures.FIG4,
        pictures.FIG5,
        text.FIG6,
        convex.FIG7,
        finetuning.TABLE1,
        vsgd.TABLE1,
    )
}
