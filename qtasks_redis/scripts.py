"""The Lua scripts. Each is one atomic step, and uses the server's clock.

A queue has five keys, which are passed one after the other:

    stream   the messages that are receivable or in flight, in order
    cursor   the id of the last message that was delivered for the first time
    leases   a sorted set of the holders: `id:count:holder` -> the time when its lease runs out
    delayed  a sorted set: message -> the time at which it is due
    bell     a list with at most one token; idle receivers block on it, a token wakes one of them

`id:count:holder` is the token that proves ownership. A takeover makes a new token, and the old one
is no longer found. A released message is a lease that has run out. Times are in milliseconds. All
keys of a namespace have one hash tag, so they are in one slot of a cluster.
"""

from __future__ import annotations

from hashlib import sha1

from qtasks_core.records import FIRST_BEGUN, FIRST_FINAL, RANKS

_QUEUES = """
local STREAM, CURSOR, LEASES, DELAYED, BELL = 0, 1, 2, 3, 4
local FAR = 9007199254740991  -- a time that never comes; larger integers Lua does not keep exactly
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- A full server refuses a script whose first write could need memory, and none that has written
-- already. This writes nothing; after it, what moves or frees goes through.
local lifted = false
local function lift(at)
  if lifted then return end
  lifted = true
  redis.call('ZREM', KEYS[at + LEASES], '')
end

local rung = {}
local function ring(at)
  if rung[at] then return end
  rung[at] = true
  lift(at)
  if redis.call('EXISTS', KEYS[at + BELL]) == 0 then
    redis.call('LPUSH', KEYS[at + BELL], '1')
  end
end

local function earliest(key)
  return tonumber(redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')[2]) or FAR
end

local function enqueue(at, delay, message)
  if delay == 0 then
    redis.call('XADD', KEYS[at + STREAM], '*', 'm', message)
    ring(at)
    return
  end
  -- `now` was rounded down, so a millisecond more keeps the message from coming early.
  local due = now + delay + 1
  local before = earliest(KEYS[at + DELAYED])
  -- The same message published again keeps its first time.
  redis.call('ZADD', KEYS[at + DELAYED], 'NX', due, message)
  if due < before then ring(at) end
end
"""


class Script:
    """A script's source, and the digest by which the server knows it."""

    __slots__ = ("sha", "source")

    def __init__(self, source: str) -> None:
        self.source = source
        self.sha = sha1(source.encode(), usedforsecurity=False).hexdigest()


PUBLISH = Script(
    _QUEUES
    + """
-- ARGV, three a message: position of its queue in KEYS, delay, message.
for a = 1, #ARGV, 3 do
  enqueue(tonumber(ARGV[a]), tonumber(ARGV[a + 1]), ARGV[a + 2])
end
"""
)

TAKE = Script(
    _QUEUES
    + """
-- ARGV: holder, lease, limit, then two a queue: how many, and the earliest due time the caller
-- knew. Returns: milliseconds until something here may change by itself, the earliest due time of
-- each queue, and four for each delivery: number of its queue from 0, token, count, message.
local holder, lease, limit = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local change, dues, taken = FAR, {}, {}

local function promote(at)
  local due = redis.call('ZRANGEBYSCORE', KEYS[at + DELAYED], '-inf', now, 'LIMIT', 0, 1000)
  if #due > 0 then lift(at) end
  for _, message in ipairs(due) do
    redis.call('XADD', KEYS[at + STREAM], '*', 'm', message)
  end
  if #due > 0 then redis.call('ZREM', KEYS[at + DELAYED], unpack(due)) end
end

local function take(queue, at, want)
  local held = {}
  local function hold(entry, count)
    local token, n = entry[1] .. ':' .. count .. ':' .. holder, #taken
    held[#held + 1] = now + lease
    held[#held + 1] = token
    taken[n + 1], taken[n + 2], taken[n + 3], taken[n + 4] = queue, token, count, entry[2][2]
  end
  local over = redis.call('ZRANGEBYSCORE', KEYS[at + LEASES], '-inf', now, 'LIMIT', 0, want)
  for _, token in ipairs(over) do
    local id, count = string.match(token, '^(.-):(%d+):')
    local entry = redis.call('XRANGE', KEYS[at + STREAM], id, id)[1]
    if entry then hold(entry, count + 1) end
  end
  local got, last = #over, nil
  if got < want then
    local after = redis.call('GET', KEYS[at + CURSOR]) or '0-0'
    local fresh = redis.call('XRANGE', KEYS[at + STREAM], '(' .. after, '+', 'COUNT', want - got)
    for _, entry in ipairs(fresh) do hold(entry, 1) end
    if #fresh > 0 then last = fresh[#fresh][1] end
    got = got + #fresh
  end
  if #held > 0 then lift(at) end
  -- The new holders first: were the server to refuse what follows, nothing would be lost.
  if #held > 0 then redis.call('ZADD', KEYS[at + LEASES], unpack(held)) end
  if #over > 0 then redis.call('ZREM', KEYS[at + LEASES], unpack(over)) end
  if last then redis.call('SET', KEYS[at + CURSOR], last) end
  return got
end

for queue = 0, #KEYS / 5 - 1 do
  local at = queue * 5 + 1
  local want = math.min(tonumber(ARGV[4 + queue * 2]), limit)
  promote(at)
  local got = 0
  if want > 0 then got = take(queue, at, want) end
  limit = limit - got
  local due = earliest(KEYS[at + DELAYED])
  -- There may be more than the caller can take; and of a new earliest due time every sleeper must
  -- hear, so each passes the token on once.
  if got == want or due < tonumber(ARGV[5 + queue * 2]) then ring(at) end
  dues[queue + 1] = due
  change = math.min(change, due, earliest(KEYS[at + LEASES]))
end
return {math.max(change - now, 0), dues, taken}
"""
)

SETTLE = Script(
    _QUEUES
    + """
-- ARGV, three a settlement: position of its queue in KEYS, token, what; `retry` is followed
-- by position of the queue, delay and message of the new one. Returns 1 or 0 (lost) for each.
local answers, spent = {}, {}
local a = 1
while a <= #ARGV do
  local at, token, what = tonumber(ARGV[a]), ARGV[a + 1], ARGV[a + 2]
  a = a + 3
  local deadline = tonumber(redis.call('ZSCORE', KEYS[at + LEASES], token) or 0)
  local mine = deadline > now
  if mine then lift(at) end
  if mine and what == 'release' then
    redis.call('ZADD', KEYS[at + LEASES], 0, token)
    ring(at)
  elseif mine then
    if what == 'retry' then
      enqueue(tonumber(ARGV[a]), tonumber(ARGV[a + 1]), ARGV[a + 2])
    end
    redis.call('ZREM', KEYS[at + LEASES], token)
    spent[at] = spent[at] or {}
    table.insert(spent[at], string.match(token, '^(.-):'))
  end
  if what == 'retry' then a = a + 3 end
  answers[#answers + 1] = mine and 1 or 0
end
for at, ids in pairs(spent) do redis.call('XDEL', KEYS[at + STREAM], unpack(ids)) end
return answers
"""
)

EXTEND = Script(
    _QUEUES
    + """
-- ARGV: lease, then two a delivery: position of its queue in KEYS, token.
-- Returns 1 or 0 (lost) for each.
local answers = {}
for a = 2, #ARGV, 2 do
  local at, token = tonumber(ARGV[a]), ARGV[a + 1]
  local leases = KEYS[at + LEASES]
  local mine = tonumber(redis.call('ZSCORE', leases, token) or 0) > now
  if mine then lift(at) end
  if mine then redis.call('ZADD', leases, now + tonumber(ARGV[1]), token) end
  answers[#answers + 1] = mine and 1 or 0
end
return answers
"""
)

RING = Script(
    _QUEUES
    + """
for at = 1, #KEYS, 5 do ring(at) end
"""
)

SAVE = Script(
    f"local RANKS, FIRST_BEGUN, FIRST_FINAL = {RANKS}, {FIRST_BEGUN}, {FIRST_FINAL}"
    """
-- KEYS: the records. ARGV, five a record: length of its head, head and record, milliseconds to
-- keep it ('' for ever), and for a final one the channels of its inbox and of its watchers.
-- The head is ten digits of order, three of length, and the execution.
-- Returns for each 1 (done), or what is there instead.
local answers, boxes = {}, {}

local function send(channel, box)
  -- A push that is refused fails no record.
  redis.pcall('PUBLISH', channel, table.concat(box))
end

local function push(channel, item)
  if channel == '' then return end
  local box = boxes[channel]
  if not box then
    box = {size = 0}
    boxes[channel] = box
  end
  if box.size > 262144 then
    send(channel, box)
    box = {size = 0}
    boxes[channel] = box
  end
  box[#box + 1] = item
  box.size = box.size + #item
end

local function push_final(key, record, inbox, watchers)
  -- A large record is only named, so that the server need not hold it for each listener.
  local body = #record > 65536 and '=' .. key or record
  local item = struct.pack('>I4', #body) .. body
  push(inbox, item)
  push(watchers, item)
end

-- On a full server a small record of a task that has begun is taken all the same, or no task could
-- end: after a first write, which changes nothing here, a script may use memory.
for i = 1, #KEYS do
  local value = ARGV[i * 5 - 3]
  local begun = tonumber(string.sub(value, 1, 10)) % RANKS >= FIRST_BEGUN
  if begun and #value <= 65536 and redis.call('PTTL', KEYS[i]) < 0 then
    redis.call('PERSIST', KEYS[i])
    break
  end
end

for i = 1, #KEYS do
  local key, a = KEYS[i], i * 5 - 4
  local length, value, keep = tonumber(ARGV[a]), ARGV[a + 1], ARGV[a + 2]
  local head, there = string.sub(value, 1, length), redis.call('GETRANGE', key, 0, length - 1)
  local order, stored = tonumber(string.sub(head, 1, 10)), tonumber(string.sub(there, 1, 10))
  if there == head then
    answers[i] = 1
  elseif stored and (
    stored % RANKS >= FIRST_FINAL or order < stored or order % RANKS < FIRST_BEGUN
  ) then
    answers[i] = redis.call('GET', key)
  else
    if keep == '' then
      redis.call('SET', key, value)
    else
      redis.call('SET', key, value, 'PX', keep)
    end
    if order % RANKS >= FIRST_FINAL then
      push_final(key, string.sub(value, length + 1), ARGV[a + 3], ARGV[a + 4])
    end
    answers[i] = 1
  end
end
for channel, box in pairs(boxes) do send(channel, box) end
return answers
"""
)
