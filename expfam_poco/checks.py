"""stub"""


class LawError(AssertionError): ...


def check_family(family): ...
