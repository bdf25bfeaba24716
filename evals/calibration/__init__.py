"""`kvsluice calibrate`: chooses, for a model, the numbers that a recipe leaves to the model's profile.

    options      what can be asked for
    candidates   what may be chosen, what each costs, what a budget leaves of it; free of torch
    walk         rows on their way through a model's layers, as prefill runs them
    first_cut    how far each candidate turns the final hidden rows away from those of the full pass
    choosing     who goes on to the second cut, and who wins it; free of torch
    records      the report
    runner       all of it in order
    overview, plot

docs/calibration.md says how it chooses and what that is worth.
"""
