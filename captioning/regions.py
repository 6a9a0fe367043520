"""What models on region features can explain: regions, not pixels."""
from captioning.errors import InputError

ON_PIXELS = ("grad_cam", "guided_grad_cam")     # methods that are maps of pixels and nothing else


def methods_of_regions(methods, weight):
    """Those of the methods that explain regions; says in one sentence which are left out. InputError if all are."""
    left = [method for method in methods if method not in ON_PIXELS]
    if not left:
        raise InputError(f"{weight} works on region features, which have no pixel maps: name other --methods than "
                         f"{' and '.join(methods)}, lrp for one")
    if len(left) < len(methods):
        say_what_lacks([method for method in methods if method in ON_PIXELS], weight)
    return left


def say_what_lacks(names, weight):
    """One sentence on the screen."""
    print(f"{weight} works on region features, which have no pixel maps: {', '.join(names)} left out")
