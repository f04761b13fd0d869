"""How good an encoder is: features, extracted once and cached (features); linear probe and k-NN on them (linear_probe,
knn) with floors beside (floors); from an encoder to a recorded result (run, ledger) or to a line of a training log
(online); figures.
"""
