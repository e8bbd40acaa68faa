"""The quality benchmark: methods compared by counting on drawn scenes, `python -m testbed.quality`.

`contenders` says what is compared, `forms` which pictures (`tasks`) that needs, `pictures` makes them, `metrics`
measures them, `running` does so in parallel and keeps the results, `sources` tells when they are out of date,
`statistics` and `report` sum them up, and `sheets` shows some.
"""
