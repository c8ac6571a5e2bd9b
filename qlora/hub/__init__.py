"""The Hub: adapters pushed so that nothing can be lost, and loaded back from anywhere.

`destination` looks, with `account`, whether a push can succeed before a minute is spent on training; `parcel` gathers what is
sent; `push` sends it with `upload`, as one commit that is there or not, and holds the server to it; `fetch` brings an `adapter`
back. `patience` is what all of them wait with.
"""
