"""The Lua scripts. Each is one atomic step, and uses the server's clock.

A queue has a level for each priority in use. A level has three keys, and a queue three more. They
are passed one after the other:

    stream   the messages that are receivable or in flight, in order
    cursor   the id of the last message that was delivered for the first time
    leases   a sorted set of the holders: `id:count:holder` -> the time when its lease runs out
    delayed  a sorted set: the digit of the priority and the message -> the time at which it is due
    bell     a list with at most one token; idle receivers block on it, a token wakes one of them
    levels   a set of the priorities that have messages, without the usual one

The keys of a level end in the name of the queue. Those of other priorities than the usual one have
a colon and the priority behind it. Neither names of queues nor names of apps have a colon.

`id:count:holder` is the token that proves ownership. A takeover makes a new token, and the old one
is no longer found. A released message is a lease of nobody that has run out. Times are in
milliseconds. All keys of a namespace have one hash tag, so they are in one slot of a cluster.
"""

from __future__ import annotations

from hashlib import sha1

from qtasks_core.records import FIRST_BEGUN, RANKS

QUEUES = """
local STREAM, CURSOR, LEASES, DELAYED, BELL, LEVELS, ALL = 0, 1, 2, 3, 4, 5, 6
local USUAL = '5'
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

-- The key of another level of the same queue, made of that of the usual one.
local function at_level(key, priority)
  return priority == USUAL and key or key .. ':' .. priority
end

-- The priority of the level whose keys begin at KEYS[at].
local priorities = {}
local function priority_of(at)
  local found = priorities[at]
  if not found then
    found = string.match(KEYS[at + STREAM], ':stream:[^:]+:(%d)$') or USUAL
    priorities[at] = found
  end
  return found
end

local function add(stream, levels, priority, message)
  redis.call('XADD', stream, '*', 'm', message)
  if priority ~= USUAL then redis.call('SADD', levels, priority) end
end

local function levels_of(at)
  local levels = redis.call('SMEMBERS', KEYS[at + LEVELS])
  levels[#levels + 1] = USUAL
  return levels
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
    add(KEYS[at + STREAM], KEYS[at + LEVELS], priority_of(at), message)
    ring(at)
    return
  end
  -- `now` was rounded down, so a millisecond more keeps the message from coming early.
  local due = now + delay + 1
  local before = earliest(KEYS[at + DELAYED])
  -- The same message published again keeps its first time.
  redis.call('ZADD', KEYS[at + DELAYED], 'NX', due, priority_of(at) .. message)
  if due < before then ring(at) end
end

-- Settle a delivery of the level whose keys begin at KEYS[at]. `what` is `ack`, `release` or
-- `retry`; a retry has a new message, the position of its level, and its delay. Returns 1 or -1
-- (lost). A lease that has run out is not lost before another receiver takes it over, with a new
-- token.
local settled = {}
local function settle(at, token, what, target, delay, message)
  lifted = true
  if redis.call('ZREM', KEYS[at + LEASES], token) == 0 then return -1 end
  if what == 'release' then
    redis.call('ZADD', KEYS[at + LEASES], 0, string.match(token, '^.-:%d+:'))
    ring(at)
    return 1
  end
  if what == 'retry' then enqueue(target, delay, message) end
  local ids = settled[at]
  if not ids then
    ids = {}
    settled[at] = ids
  end
  ids[#ids + 1] = string.sub(token, 1, string.find(token, ':', 1, true) - 1)
  return 1
end

local function delete_settled()
  for at, ids in pairs(settled) do redis.call('XDEL', KEYS[at + STREAM], unpack(ids)) end
end
"""


class Script:
    """A script's source, and the digest by which the server knows it."""

    __slots__ = ("sha", "source")

    def __init__(self, source: str) -> None:
        self.source = source
        self.sha = sha1(source.encode(), usedforsecurity=False).hexdigest()


PUBLISH = Script(
    QUEUES
    + """
-- ARGV: two for each message, packed: position of its queue in KEYS, delay; then the messages.
local sent = cmsgpack.unpack(ARGV[1])
for i = 2, #ARGV do enqueue(sent[i * 2 - 3], sent[i * 2 - 2], ARGV[i]) end
"""
)

_RANKS = ", ".join(f"['{RANKS + rank:010d}'] = {rank}" for rank in range(FIRST_BEGUN))
FIRST = f"local FIRST = {{{_RANKS}}}  -- the orders of the first records of first attempts\n"

TAKE = Script(
    QUEUES
    + FIRST
    + """
-- ARGV: holder, lease, limit, the start of a record's key ('' if records are elsewhere), then two a
-- queue: how many, and the earliest due time the caller knew. Returns: milliseconds until something
-- here may change by itself; the earliest due time of each queue; three for each level that had
-- deliveries: number of its queue from 0, its priority, how many; and four for each delivery: its
-- token, count and message, and 1 if the task has no record but a first one of its first attempt.
local holder, lease, limit, records = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local change, dues, levels_taken, taken = FAR, {}, {}, {}
-- Numbers are slow to write as text, so that is done once.
local over_at, first = string.format('%.0f', now + lease), ':1:' .. holder

local function promote(at)
  local due = redis.call('ZRANGEBYSCORE', KEYS[at + DELAYED], '-inf', now, 'LIMIT', 0, 1000)
  if #due > 0 then lift(at) end
  for _, member in ipairs(due) do
    local priority, message = string.match(member, '^(%d)(.*)$')
    if not priority then priority, message = USUAL, member end
    add(at_level(KEYS[at + STREAM], priority), KEYS[at + LEVELS], priority, message)
  end
  if #due > 0 then redis.call('ZREM', KEYS[at + DELAYED], unpack(due)) end
end

local function take(queue, at, priority, want)
  local stream = at_level(KEYS[at + STREAM], priority)
  local cursor = at_level(KEYS[at + CURSOR], priority)
  local leases = at_level(KEYS[at + LEASES], priority)
  local tokens, got, last = {}, 0, nil
  local function hold(entry, token, count)
    local n = #taken
    tokens[#tokens + 1] = token
    taken[n + 1], taken[n + 2], taken[n + 3], taken[n + 4] = token, count, entry[2][2], 0
  end
  local over = redis.call('ZRANGEBYSCORE', leases, '-inf', now, 'LIMIT', 0, want)
  for _, token in ipairs(over) do
    local id, count = string.match(token, '^(.-):(%d+):')
    local entry = redis.call('XRANGE', stream, id, id)[1]
    if entry then hold(entry, id .. ':' .. count + 1 .. ':' .. holder, count + 1) end
  end
  got = #over
  if got < want then
    local after = redis.call('GET', cursor) or '0-0'
    local fresh = redis.call('XRANGE', stream, '(' .. after, '+', 'COUNT', want - got)
    for _, entry in ipairs(fresh) do hold(entry, entry[1] .. first, 1) end
    if #fresh > 0 then last = fresh[#fresh][1] end
    got = got + #fresh
  end
  if #tokens > 0 then
    local n, held = #levels_taken, {}
    levels_taken[n + 1], levels_taken[n + 2], levels_taken[n + 3] = queue, priority, #tokens
    -- Backwards: the server looks for the places in a small set from its beginning.
    for i = #tokens, 1, -1 do
      held[#held + 1] = over_at
      held[#held + 1] = tokens[i]
    end
    lift(at)
    -- The new holders first: were the server to refuse what follows, nothing would be lost.
    redis.call('ZADD', leases, unpack(held))
  end
  if #over > 0 then redis.call('ZREM', leases, unpack(over)) end
  if last then redis.call('SET', cursor, last) end
  change = math.min(change, earliest(leases))
  return got
end

-- Take from the levels of a queue, the highest priority first.
local function take_by_priority(queue, at, want, levels)
  table.sort(levels, function(a, b) return tonumber(a) > tonumber(b) end)
  local got = 0
  for _, priority in ipairs(levels) do
    local some = 0
    if got < want then some = take(queue, at, priority, want - got) end
    got = got + some
    if some == 0 and got < want and priority ~= USUAL
      and redis.call('XLEN', at_level(KEYS[at + STREAM], priority)) == 0
    then
      redis.call('SREM', KEYS[at + LEVELS], priority)
    end
  end
  return got
end

-- What follows the 4 bytes of a message's head, if its first field is a uuid of 36 bytes.
local UUID = '\\164uuid\\217\\036'

-- Note which tasks have at most a first record, of the first attempt.
local function look_at_records()
  for start = 1, #taken, 2000 do
    local keys, places = {}, {}
    for n = start, math.min(start + 1999, #taken), 4 do
      local message = taken[n + 2]
      if string.sub(message, 5, 11) == UUID then
        keys[#keys + 1] = records .. string.sub(message, 12, 47)
        places[#places + 1] = n + 3
      end
    end
    if #keys > 0 then
      for i, value in ipairs(redis.call('MGET', unpack(keys))) do
        if not value or FIRST[string.sub(value, 1, 10)] then taken[places[i]] = 1 end
      end
    end
  end
end

for queue = 0, #KEYS / ALL - 1 do
  local at = queue * ALL + 1
  local want = math.min(tonumber(ARGV[5 + queue * 2]), limit)
  promote(at)
  local got = 0
  if want > 0 then
    local levels = levels_of(at)
    if #levels == 1 then
      got = take(queue, at, USUAL, want)
    else
      got = take_by_priority(queue, at, want, levels)
    end
  end
  limit = limit - got
  local due = earliest(KEYS[at + DELAYED])
  -- There may be more than the caller can take; and of a new earliest due time every sleeper must
  -- hear, so each passes the token on once.
  if got == want or due < tonumber(ARGV[6 + queue * 2]) then ring(at) end
  dues[queue + 1] = due
  change = math.min(change, due)
end
if records ~= '' then look_at_records() end
return {math.max(change - now, 0), dues, levels_taken, taken}
"""
)

SETTLE = Script(
    QUEUES
    + """
-- ARGV: five for each settlement, packed: the arguments of `settle` but the message; then the
-- messages of the retries. Returns 1 or -1 (lost) for each.
local sent, answers, message = cmsgpack.unpack(ARGV[1]), {}, 2
for a = 1, #sent, 5 do
  answers[#answers + 1] =
    settle(sent[a], sent[a + 1], sent[a + 2], sent[a + 3], sent[a + 4], ARGV[message])
  if sent[a + 2] == 'retry' then message = message + 1 end
end
delete_settled()
return answers
"""
)

EXTEND = Script(
    QUEUES
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
    QUEUES
    + """
for at = 1, #KEYS, ALL do ring(at) end
"""
)

COUNT = Script(
    QUEUES
    + """
-- Returns how many messages are ready, delayed and in flight, and for how many milliseconds the
-- oldest ready one has been ready (-1 if there is none).
local passed = string.format('%.0f', now)
local ready = redis.call('ZCOUNT', KEYS[1 + DELAYED], '-inf', passed)
local delayed = redis.call('ZCOUNT', KEYS[1 + DELAYED], '(' .. passed, '+inf')
local in_flight, oldest = 0, math.min(earliest(KEYS[1 + DELAYED]), now)
local some = ready > 0

local function older(id)
  oldest = math.min(oldest, tonumber(string.match(id, '^%d+')))
  some = true
end

for _, priority in ipairs(levels_of(1)) do
  local stream = at_level(KEYS[1 + STREAM], priority)
  local leases = at_level(KEYS[1 + LEASES], priority)
  local held = redis.call('ZCOUNT', leases, '(' .. passed, '+inf')
  in_flight = in_flight + held
  ready = ready + redis.call('XLEN', stream) - held
  local after = redis.call('GET', at_level(KEYS[1 + CURSOR], priority)) or '0-0'
  local fresh = redis.call('XRANGE', stream, '(' .. after, '+', 'COUNT', 1)[1]
  if fresh then older(fresh[1]) end
  -- These were released, or their leases have run out.
  for _, token in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', passed, 'LIMIT', 0, 1000)) do
    older(token)
  end
end
return {ready, delayed, in_flight, some and now - oldest or -1}
"""
)

PURGE = Script(
    QUEUES
    + """
-- ARGV: how many messages of each kind at most. Returns how many were dropped.
local most = tonumber(ARGV[1])
local dropped = redis.call('ZREMRANGEBYRANK', KEYS[1 + DELAYED], 0, most - 1)
for _, priority in ipairs(levels_of(1)) do
  local stream = at_level(KEYS[1 + STREAM], priority)
  local leases = at_level(KEYS[1 + LEASES], priority)
  local ids = {}
  local over = redis.call('ZRANGEBYSCORE', leases, '-inf', now, 'LIMIT', 0, most)
  for _, token in ipairs(over) do ids[#ids + 1] = string.match(token, '^(.-):') end
  local after = redis.call('GET', at_level(KEYS[1 + CURSOR], priority)) or '0-0'
  local fresh = redis.call('XRANGE', stream, '(' .. after, '+', 'COUNT', most)
  for _, entry in ipairs(fresh) do ids[#ids + 1] = entry[1] end
  if #over > 0 then redis.call('ZREM', leases, unpack(over)) end
  if #ids > 0 then dropped = dropped + redis.call('XDEL', stream, unpack(ids)) end
end
return dropped
"""
)
