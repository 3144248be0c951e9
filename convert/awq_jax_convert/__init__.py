# SPDX-License-Identifier: Apache-2.0
"""Foreign bytes to our trees and back: the only place that knows other people's names and bit orders.

Neither torch nor pickle is ever imported, and no code that a checkpoint carries is ever run.
"""
